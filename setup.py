"""Packaging. Exact, tested versions are in constraints.txt; here are the ranges that the code is written for.

On a Linux machine without a GPU, install torch for CPUs first; that of PyPI would bring gigabytes of CUDA packages:

    pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    pip install .[hf]
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (root / "hawk_kernels/__init__.py").read_text(), re.M).group(1)

# Upper bounds are what was tried: `make floor` and `make ceiling` run the tests at both ends. Triton 3.9 refuses the
# kernels in its interpreter, and its ptxas does not compile them ahead of time.
torch = "torch>=2.11,<2.14"
triton = "triton>=3.6,<3.9; sys_platform == 'linux'"

# prune() needs transformers; score_and_select() does not, and is called from code bases that pin their own fork of it.
hf = ["transformers>=5.5,<5.24", "pillow>=10.1"]
plots = ["matplotlib>=3.8"]
# The plugin names methods of vLLM that other releases may rename; make vllm runs its tests.
vllm = ["vllm>=0.32,<0.33"]
# Likewise of lmms-eval; make lmms runs its tests.
lmms = ["lmms-eval>=0.7.3,<0.8"]
serve = ["transformers[serving]"]
dev = [
    "accelerate>=1.2",
    "hypothesis>=6.100",
    "mypy>=1.10",
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "scikit-learn>=1.4",
    "setuptools>=70",
]

setup(
    name="hawk_kernels",
    version=version,
    description="Triton kernels that make visual-token pruning of vision-language models actually fast",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["hawk_kernels", "hawk_kernels.*"]),
    package_data={
        "hawk_kernels": [
            "py.typed",
            "head_weights/*.json",
            "pictures/*.html",
            "backends/kernels/tables/*.json",
            "assets/*",
            "assets/*/*",
            "assets/*/*/*",
        ]
    },
    python_requires=">=3.10,<3.14",
    install_requires=["numpy>=1.26", torch, triton],
    entry_points={
        "console_scripts": ["hawk-kernels = hawk_kernels.__main__:main"],
        "vllm.general_plugins": ["hawk_kernels = hawk_kernels.vllm:register"],
        "lmms_eval.models": ["hawk = hawk_kernels.lmms_eval_plugin:manifest"],
    },
    extras_require={
        "hf": hf,
        "plots": plots,
        "serve": hf + serve,
        "vllm": hf + vllm,
        "lmms": hf + lmms,
        "dev": hf + plots + dev,
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
