"""Serve a system by HTTP: sounds from text, edits and variations, at once or as jobs that report their progress.

python scripts/serve.py system=SYSTEM port=8000
"""

import os

from omegaconf import DictConfig

from foley.cli.command import command


@command("script/serve")
def main(cfg: DictConfig) -> None:
    """Load the systems and serve them until a signal."""
    # By themselves PyTorch's threads wait for each other in a loop, on cores that answers and other processes want:
    # with both cores of a machine busy, a clip took ten times as long. Read when PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    try:
        from foley.cli.serving import serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"foley serve wants {error.name}: pip install 'foley[serve]'") from error
    serve(cfg)


if __name__ == "__main__":
    main()
