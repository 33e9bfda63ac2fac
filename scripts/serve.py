"""Serve a system by HTTP: sounds from text, edits and variations, at once or as jobs that report their progress.

python scripts/serve.py system=SYSTEM port=8000
"""

from omegaconf import DictConfig

from foley.cli.command import command


@command("script/serve")
def main(cfg: DictConfig) -> None:
    """Load the systems and serve them until a signal."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    try:
        from foley.cli.serving import serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"foley serve wants {error.name}: pip install 'foley[serve]'") from error
    serve(cfg)


if __name__ == "__main__":
    main()
