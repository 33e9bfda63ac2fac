"""Embeddings of prompts seen before: the last ones in memory, all of them on disk where a directory is given."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foley.files import write_tensors
from foley.logs import get_logger
from foley.models.text.base import TextConditioner, TextEmbedding

logger = get_logger(__name__)


class EmbeddingCache:
    """Maps a prompt to its unpadded embedding `[S, Dc]`.

    Args:
        identity: everything besides the prompt that the embedding depends on (model, revision, length, type).
        directory: where embeddings stay between runs, one file per prompt named by content hash; None keeps none.
        memory_items: how many of the most recently used embeddings stay in memory.
    """

    def __init__(self, identity: str, directory: Path | None = None, memory_items: int = 256) -> None:
        self.identity = identity
        self.directory = directory
        self.memory_items = memory_items
        self._memory: OrderedDict[str, Tensor] = OrderedDict()

    def path(self, prompt: str) -> Path | None:
        """The file of a prompt, whether it exists or not."""
        if self.directory is None:
            return None
        digest = hashlib.sha256(f"{self.identity}\x1f{prompt}".encode(errors="surrogatepass")).hexdigest()
        return self.directory / digest[:2] / f"{digest}.safetensors"

    def get(self, prompt: str, device: torch.device) -> Tensor | None:
        """The embedding on `device`, or None where it is not known; an unreadable file counts as not known."""
        if prompt in self._memory:
            self._memory.move_to_end(prompt)
            return self._memory[prompt].to(device)
        path = self.path(prompt)
        if path is None or not path.is_file():
            return None
        try:
            embedding = load_file(path)["embedding"].to(device)
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("%s cannot be read (%s); the embedding is computed again", path, error)
            return None
        self._remember(prompt, embedding)
        return embedding

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Keep an embedding `[S, Dc]`; the file appears whole or not at all."""
        self._remember(prompt, embedding)
        path = self.path(prompt)
        if path is not None:
            write_tensors(path, {"embedding": embedding.detach().cpu()})

    def forget(self) -> None:
        """Leave nothing in memory; files stay."""
        self._memory.clear()

    def embed(
        self, prompts: Sequence[str], device: torch.device, encode: Callable[[list[str]], list[Tensor]]
    ) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]` on `device`, zero where the mask is false.

        Args:
            encode: prompts that are not known, each once, to unpadded embeddings `[S, Dc]`.
        """
        found = {prompt: self.get(prompt, device) for prompt in dict.fromkeys(prompts)}
        known = {prompt: embedding for prompt, embedding in found.items() if embedding is not None}
        missing = [prompt for prompt in found if prompt not in known]
        if missing:
            known.update(zip(missing, encode(missing), strict=True))
        for prompt in missing:
            self.put(prompt, known[prompt])
        rows = [known[prompt] for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        embeddings = pad_sequence(rows, batch_first=True)
        return TextEmbedding(embeddings, torch.arange(embeddings.shape[1], device=device) < lengths[:, None])

    def _remember(self, prompt: str, embedding: Tensor) -> None:
        self._memory[prompt] = embedding
        self._memory.move_to_end(prompt)
        if len(self._memory) > self.memory_items:
            self._memory.popitem(last=False)


class CachedText:
    """A conditioner that is not trained any more: encodes each distinct prompt once, the empty one included.

    Rounding depends on what else is encoded in the same batch, and stays with the prompt from then on.
    """

    def __init__(self, text: TextConditioner) -> None:
        self._text = text
        self.cache = EmbeddingCache(type(text).__name__)

    def __call__(self, prompts: list[str]) -> TextEmbedding:
        """B prompts to embeddings `[B, S, Dc]`, zero where the mask is false."""
        return self.cache.embed(prompts, next(self._text.parameters()).device, self._encode)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> list[Tensor]:
        encoded = self._text(prompts)
        return [row[mask] for row, mask in zip(encoded.embeddings, encoded.mask, strict=True)]
