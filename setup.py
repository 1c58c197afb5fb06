"""Packaging; `pip install .` or `pip install -e ".[test]"`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

COMMANDS = (
    "train", "evaluate", "sample", "prepare", "convert", "join",
    "compress", "decompress", "encode", "explore", "export", "benchmark", "doctor", "sweep",
)  # fmt: skip
BESIDE = {"configs": ["**/*.yaml"], "pretrained": ["*/*"]}
"""Folders of a checkout that are inside the package once it is installed, and which of their files."""


def readme() -> str:
    """README.md for the package index, which has no other file of the checkout: without pictures and relative links."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\([^)]*\)\n\n\*[^*]*\*\n\n", "", text)  # with what is written below it
    return re.sub(r"\[([^]]*)\]\((?!https?://)[^)]*\)", r"\1", text)


setup(
    name="nvae",
    version="0.1.0",
    description="Train deep hierarchical VAEs: exact, fast, and readable",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="The nvae contributors",
    license="Apache-2.0",
    keywords=["variational autoencoder", "NVAE", "VDVAE", "VQ-VAE-2", "generative model", "PyTorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["nvae", "nvae.*"]), *(f"nvae.{folder}" for folder in BESIDE)],
    package_dir={f"nvae.{folder}": folder for folder in BESIDE},
    package_data={
        "nvae": ["py.typed", "benchmark/*.json", "evaluation/report.html", "kernels/cpu/*.cpp", "kernels/cpu/*.h"],
        **{f"nvae.{folder}": patterns for folder, patterns in BESIDE.items()},
    },
    entry_points={"console_scripts": [f"nvae-{name} = nvae.commands.{name}:main" for name in COMMANDS]},
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "numpy",
        "pyyaml",
        "pydantic>=2.7",
        "tqdm",
        "filelock",
        "tensorboard",
        "safetensors",
        "lmdb",
        "pillow",
        "matplotlib",
        "scikit-learn",
        "scipy",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "pytest-cov",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
            "torch-fidelity>=0.4",
            "constriction>=0.4",
            "setuptools>=70.1",
            "mkdocs-material>=9.5",
            "mkdocs-jupyter",
            "nbclient",
            "ipykernel",
            "huggingface_hub",
        ],
        "docs": ["mkdocs-material>=9.5", "mkdocs-jupyter"],
        "fid": ["torch-fidelity>=0.4"],
        "codec": ["constriction>=0.4"],
        "wandb": ["wandb>=0.31"],
        "hub": ["huggingface_hub"],
        "explore": ["gradio>=6"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
    },
)
