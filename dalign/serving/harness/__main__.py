"""lm-evaluation-harness with `--model dalign`; its own options are all the same."""

import sys


def main() -> int:
  """Runs the harness and returns the exit code."""
  try:
    from lm_eval import __main__ as command

    from dalign.serving.harness import lm_eval_model  # noqa: F401 - registers itself
  except ImportError as error:
    print(f"dalign: {error}; pip install 'dalign[harness]'", file=sys.stderr)
    return 2
  try:
    command.cli_evaluate()
  except ValueError as error:
    print(f"dalign: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
