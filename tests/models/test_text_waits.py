"""Text comes to a device without a wait for it: counted on a pretended one."""

import torch
from pretend_device import PretendDevice
from safetensors.torch import save_file

from foley.core.config import PROJECT_ROOT
from foley.core.devices import to_device
from foley.core.embeddings import pad_rows
from foley.models.text import EmbeddingCache, FeatureConditioner, SmallTextEncoder
from foley.models.text.frozen_t5 import RandomEmbeddings


def on_the_device(compute):
    """What `compute(device)` gives there, on the CPU; it must not have waited."""
    with torch.no_grad(), PretendDevice() as device:
        result = compute(device)
        assert device.waits == []
        return device.get(result.embeddings), device.get(result.mask)


def same_on_the_device(text, prompts):
    with torch.no_grad():
        expected = text(prompts)

    def compute(device):
        device.put_module(text)
        return text(prompts)

    embeddings, mask = on_the_device(compute)
    torch.testing.assert_close(embeddings, expected.embeddings)
    assert torch.equal(mask, expected.mask)


def test_a_copy_from_the_cpu_is_pinned_and_a_copy_back_waits():
    with PretendDevice() as device:
        there = to_device(torch.ones(3), device.device)
        assert device.waits == []
        assert to_device(there, device.device) is there
        assert to_device(there, torch.device("cpu")).tolist() == [1, 1, 1]
        assert len(device.waits) == 1


def test_encoders_that_train_wait_for_nothing(tmp_path):
    torch.manual_seed(0)
    tokenizer = str(PROJECT_ROOT / "data" / "tokenizer" / "audiocaps.json")
    same_on_the_device(SmallTextEncoder(tokenizer, 16, 1, 2, 12), ["a dog barks", ""])
    save_file({"features": torch.randn(3, 5)}, tmp_path / "clip.safetensors")
    same_on_the_device(FeatureConditioner(5, 8, 6, str(tmp_path)), ["clip", ""])
    same_on_the_device(RandomEmbeddings(8, 4), ["rain"])


def test_embeddings_from_a_store_wait_for_nothing(tmp_path):
    rows = {"rain": torch.ones(3, 4), "": torch.zeros(1, 4)}
    made = EmbeddingCache("model", tmp_path)
    for prompt, row in rows.items():
        made.put(prompt, row)
    made.flush()
    cache = EmbeddingCache("model", tmp_path)

    def never(prompts):
        raise AssertionError(prompts)

    def compute(device):
        cache.embed(["rain"], device.device, never)
        return cache.embed(["rain", ""], device.device, never, multiple=4)

    embeddings, mask = on_the_device(compute)
    expected = pad_rows(list(rows.values()), multiple=4)
    assert torch.equal(embeddings, expected[0])
    assert torch.equal(mask, expected[1])
