"""Write a page of results from its template and from the JSON files that benchmarks wrote beside it."""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/report")
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.reporting.pages import write_page

    results_dir = Path(cfg.results_dir)
    page = results_dir / f"{cfg.page}.md"
    write_page(Path(cfg.templates_dir) / page.name, page)
    get_logger(__name__).info("wrote %s", page)


if __name__ == "__main__":
    main()
