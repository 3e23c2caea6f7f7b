"""Every kernel on several streams at once, beside another kernel that fills the device, and from several threads."""

import threading

import pytest
import torch

from hawk_kernels import (
    attention_column_mean,
    compact,
    greedy_dpp,
    greedy_max_min,
    score_and_select,
    score_hidden_and_select,
    score_peaks,
)
from hawk_kernels.backends.kernels import select_topk as select_topk_kernel
from tests.cases import make_case
from tests.test_score_hidden import HiddenCase

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def of_score_and_select(device, num_tokens):
    case = make_case(2, 4, 2, 20, num_tokens, 16, masked=True).to(device)
    return lambda: score_and_select(case.q, case.k, case.w, 0.3, backend="triton", **case.options)


def of_score_hidden(device, num_tokens):
    case = HiddenCase(num_tokens=num_tokens)
    arguments, options = case.arguments(device=device), case.options(device)
    return lambda: score_hidden_and_select(*arguments, 0.3, **options, normalize="l2", backend="triton")


def of_score_peaks(device, num_tokens):
    case = make_case(2, 4, 2, 20, num_tokens, 16, masked=True).to(device)
    return lambda: (score_peaks(case.q, case.k, case.w, backend="triton", **case.options),)


def of_select_topk(device, num_tokens):
    scores = torch.rand(2, num_tokens).to(device)
    return lambda: select_topk_kernel.select_topk(scores, 0.3, None, "floor")


def of_compact(device, num_tokens):
    embeds, keep = torch.rand(2, num_tokens, 96).to(device), (torch.rand(2, num_tokens) < 0.4).to(device)
    return lambda: compact(embeds, keep, length=num_tokens, backend="triton")


def of_attention_column_mean(device, num_tokens):
    q, k = torch.rand(1, 4, 40, 32).to(device), torch.rand(1, 2, num_tokens, 32).to(device)
    return lambda: (attention_column_mean(q, k, backend="triton"),)


def of_greedy_max_min(device, num_tokens):
    features = torch.rand(2, min(num_tokens, 500), 32).to(device)
    return lambda: greedy_max_min(features, 0.2, backend="triton")


def of_greedy_dpp(device, num_tokens):
    features, quality = (
        torch.rand(2, min(num_tokens, 500), 32).to(device),
        torch.rand(2, min(num_tokens, 500)).to(device),
    )
    return lambda: greedy_dpp(features, quality, 0.2, backend="triton")


OPERATORS = [
    of_score_and_select,
    of_score_hidden,
    of_score_peaks,
    of_select_topk,
    of_compact,
    of_attention_column_mean,
    of_greedy_max_min,
    of_greedy_dpp,
]


def tensors(result):
    return [value for value in result if isinstance(value, torch.Tensor)]


def assert_same(results, expected):
    for result in results:
        for got, want in zip(tensors(result), tensors(expected), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("operator", OPERATORS)
def test_calls_repeat_bitwise(operator, device):
    """Without a GPU this shows that the calls of the tests below are right."""
    call = operator(device, 60)
    assert_same([call()], call())
    assert tensors(call())


class TestOnDevice:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("num_tokens", [1296, 5120])
    @pytest.mark.parametrize("operator", OPERATORS)
    def test_several_streams(self, operator, num_tokens, device):
        call = operator(device, num_tokens)
        expected = call()
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in range(4)], []
        for _ in range(50):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(call())
        torch.cuda.synchronize()
        assert_same(results, expected)

    @pytest.mark.parametrize("num_tokens", [1296, 5120])
    @pytest.mark.parametrize("operator", OPERATORS)
    def test_beside_a_kernel_that_fills_the_device(self, operator, num_tokens, device):
        """Programs find a place late and in any order; what they wait for must have started before them."""
        call = operator(device, num_tokens)
        expected = call()
        other, matrix, results = torch.cuda.Stream(), torch.rand(4096, 4096, device=device), []
        torch.cuda.synchronize()
        for _ in range(50):
            with torch.cuda.stream(other):
                matrix @ matrix
            results.append(call())
        torch.cuda.synchronize()
        assert_same(results, expected)

    @pytest.mark.parametrize("operator", OPERATORS)
    def test_threads_on_one_stream(self, operator, device):
        call = operator(device, 5120)
        expected = call()
        torch.cuda.synchronize()
        results = []
        threads = [threading.Thread(target=lambda: results.extend(call() for _ in range(50))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.cuda.synchronize()
        assert len(results) == 200
        assert_same(results, expected)
