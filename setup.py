"""Packaging; `pip install .` or `pip install -e ".[test]"`."""

from pathlib import Path

from setuptools import find_packages, setup

COMMANDS = (
    "train", "evaluate", "sample", "prepare", "convert", "join", "compress", "decompress", "export", "benchmark",
    "doctor"
)  # fmt: skip

setup(
    name="nvae",
    version="0.1.0",
    description="Train deep hierarchical VAEs: exact, fast, and readable",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["nvae", "nvae.*"]), "nvae.configs"],
    package_dir={"nvae.configs": "configs"},
    package_data={
        "nvae": ["py.typed", "benchmark/*.json", "evaluation/report.html", "kernels/cpu/*.cpp", "kernels/cpu/*.h"],
        "nvae.configs": ["*.yaml"],
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
            "huggingface_hub",
        ],
        "fid": ["torch-fidelity>=0.4"],
        "codec": ["constriction>=0.4"],
        "wandb": ["wandb>=0.31"],
        "hub": ["huggingface_hub"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
    },
)
