"""Tests: readable specifications of what the project promises."""
