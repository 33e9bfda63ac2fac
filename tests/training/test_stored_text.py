"""Training on stored embeddings of captions: the text encoder is not loaded, and the run is that of online encoding."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import run_command
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from latent_parts import latent_cache_writer
from omegaconf import DictConfig
from stirring_parts import stir
from tiny_clap_t5 import save_clap_t5
from tiny_t5 import DIM, save_t5
from torch import nn
from torch.utils.data import DataLoader

from foley.core.columns import Texts
from foley.core.components import build_component
from foley.core.config import PROJECT_ROOT
from foley.core.embeddings import EmbeddingStore, TextStoreError
from foley.core.seeding import torch_generator
from foley.data.datamodule import LatentDataModule
from foley.data.latents import read_captions
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.process import DiffusionProcess
from foley.models import DiffusionTransformer, LatentNormaliser
from foley.models.text import FrozenT5Conditioner, StoredText
from foley.models.text.encoding import encode_texts
from foley.nn.adaln import AdaLNSola
from foley.system.checkpoint import read_training_checkpoint
from foley.training.callbacks.listening import AudioSamples
from foley.training.diffusion import DiffusionTraining
from foley.training.requirements import refuse_missing
from foley.training.run import train

CHANNELS, CLIPS = 32, 12
CAPTIONS = ("a dog barks", "rain falls on a roof", "a dog barks on a roof")
SMALL = [
    "experiment=tiny",
    "name=test",
    "text=t5_base",
    "text.dim=16",
    "model.width=16",
    "model.depth=2",
    "model.num_heads=2",
    "data.batch_size=4",
    "trainer.max_time=null",
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.progress=null",
    "callbacks.audio_samples=null",
    "lr_schedule.warmup_steps=1",
    "task.caption_dropout=0.5",
    "optimizer.lr=1e-2",
]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random clips of two seconds as the tiny codec's latents; each has two captions."""
    folder = tmp_path_factory.mktemp("latents") / "cache"
    with latent_cache_writer(folder, "hash", 24000, 480) as writer:
        for index in range(CLIPS):
            mean = torch.randn(CHANNELS, 100, generator=torch_generator("clip", index))
            texts, split = (CAPTIONS[index % 3], (f"sound {index}",)), "val" if index >= 8 else "train"
            writer.add(mean, torch.ones_like(mean), f"clip{index:02d}", texts[0], "", split, 2.0, texts[1])
    return folder


@pytest.fixture(scope="module")
def store(t5: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    options = config(t5, cache, folder).text
    encode_texts(FrozenT5Conditioner(str(t5), DIM), options, read_captions(str(cache)), str(folder))
    return folder


@pytest.fixture
def no_t5(monkeypatch: pytest.MonkeyPatch) -> None:
    def construct(self: FrozenT5Conditioner, *_: object, **__: object) -> None:
        pytest.fail("the text encoder is constructed")

    monkeypatch.setattr(FrozenT5Conditioner, "__init__", construct)


def config(t5: Path, cache: Path, folder: Path, *overrides: str) -> DictConfig:
    places = [f"text.name_or_path={t5}", f"data.cache_dir={cache}", f"paths.output_dir={folder}"]
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return compose("train", [*SMALL, *places, *overrides])


def losses(folder: Path) -> list[float]:
    return [float(row["train/loss"]) for row in csv.DictReader((folder / "metrics.csv").open()) if row["train/loss"]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_training_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]


def test_a_run_on_stored_embeddings_is_the_run_with_the_encoder(t5, cache, store, tmp_path: Path, monkeypatch) -> None:
    online = train(config(t5, cache, tmp_path / "online"))
    with monkeypatch.context() as without:
        without.setattr(FrozenT5Conditioner, "__init__", lambda *_, **__: pytest.fail("the encoder is constructed"))
        stored = train(config(t5, cache, tmp_path / "stored", f"data.text_dir={store}"))
        # Interrupted in the middle, with loader processes, and on where it stopped: the same to the last bit.
        part = [f"data.text_dir={store}", "data.num_workers=1"]
        train(config(t5, cache, tmp_path / "part", *part, "trainer.max_steps=2", "lr_schedule.total_steps=4"))
        train(config(t5, cache, tmp_path / "part", *part, "ckpt_path=auto"))
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "online"), rel=2e-3)
    assert stored["val/loss"] == pytest.approx(online["val/loss"], rel=2e-3)
    assert losses(tmp_path / "part") == losses(tmp_path / "stored")
    whole, resumed = weights(tmp_path / "stored"), weights(tmp_path / "part")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # Checkpoints name the encoder itself, with which the system generates, and a run may go on with it online.
    described = read_training_checkpoint(tmp_path / "stored/checkpoints/last.ckpt")["foley"]["components"]["text"]
    assert (described["_target_"], described["name_or_path"]) == ("foley.models.text.FrozenT5Conditioner", str(t5))
    train(config(t5, cache, tmp_path / "stored", "ckpt_path=auto", "trainer.max_steps=5"))


@pytest.mark.slow
def test_audiolcms_conditioning_trains_from_a_store_as_online(cache, tmp_path: Path) -> None:
    encoders = [f"text.{name}={value}" for name, value in save_clap_t5(tmp_path / "encoders").items()]
    small = [option for option in SMALL if not option.startswith(("experiment", "text"))]

    def teacher(name: str, *more: str) -> DictConfig:
        places = [f"data.cache_dir={cache}", f"paths.output_dir={tmp_path / name}", "trainer.precision=32-true"]
        with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
            recipe = ["experiment=tiny_audiolcm_teacher", "text=clap_t5", *small]
            return compose("train", [*recipe, *encoders, *places, *more])

    options = teacher("x").text
    encode_texts(build_component(options), options, read_captions(str(cache)), str(tmp_path / "text"))
    train(teacher("online"))
    train(teacher("stored", f"data.text_dir={tmp_path / 'text'}"))
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "online"), rel=2e-3)
    described = read_training_checkpoint(tmp_path / "stored/checkpoints/last.ckpt")["foley"]["components"]["text"]
    assert (described["max_length"], described["pad_to_max_length"]) == (40, True)


@pytest.mark.slow
@pytest.mark.usefixtures("no_t5")
def test_a_student_is_distilled_without_its_teachers_text_encoder(t5, cache, store, tmp_path: Path) -> None:
    place = [f"data.text_dir={store}", f"paths.output_dir={tmp_path / 'teacher'}"]
    train(config(t5, cache, tmp_path, *place, "trainer.max_steps=2"))
    teacher = tmp_path / "teacher/checkpoints/last.ckpt"
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        quick = [option for option in SMALL if option.startswith(("trainer", "callbacks.c", "lr_schedule"))]
        overrides = ["experiment=tiny_lcm", "name=test", "data.batch_size=4", "trainer.precision=32-true", *quick]
        places = [f"system={teacher}", f"data.cache_dir={cache}", f"paths.output_dir={tmp_path / 'student'}"]
        metrics = train(compose("train", [*overrides, *places, f"data.text_dir={store}"]))
    assert {"train/loss", "val/loss"} <= metrics.keys()
    described = read_training_checkpoint(tmp_path / "student/checkpoints/last.ckpt")["foley"]["components"]["text"]
    assert described["name_or_path"] == str(t5)


@pytest.mark.usefixtures("no_t5")
def test_what_does_not_belong_together_is_refused_before_training(t5, cache, store, tmp_path: Path) -> None:
    given = f"data.text_dir={store}"
    with pytest.raises(InstantiationException, match="max_length: 128 in the store, 20 in the run"):
        train(config(t5, cache, tmp_path / "a", given, "text.max_length=20"))
    cfg = config(t5, cache, tmp_path / "b", given)
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        cfg.task.text = compose("train", ["experiment=tiny"]).text
    with pytest.raises(InstantiationException, match="kind: FrozenT5Conditioner in the store, SmallTextEncoder in the"):
        train(cfg)
    with pytest.raises(ValueError, match=r"data\.text_dir=.*: this run has no text; leave it out"):
        train(config(t5, cache, tmp_path / "c", given, "stage=pretrain"))
    with pytest.raises(SystemExit, match=r"data\.text_dir=nowhere  no embeddings are there; .*foley encode-text"):
        train(config(t5, cache, tmp_path / "d", "data.text_dir=nowhere"))


def test_captions_that_are_not_stored_are_refused_with_their_names(t5, cache, tmp_path: Path) -> None:
    options = config(t5, cache, tmp_path).text
    encode_texts(FrozenT5Conditioner(str(t5), DIM), options, Texts.of(CAPTIONS), str(tmp_path / "text"))
    with pytest.raises(
        TextStoreError, match=rf"lacks the embeddings of {CLIPS} of {2 * CLIPS} captions, such as 'sound "
    ):
        LatentDataModule(str(cache), 2.0, 4, text_dir=str(tmp_path / "text"))


def test_weights_of_the_encoder_are_not_asked_for(cache, store, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    absent = config(Path("google/flan-t5-xl"), cache, Path("x"), "codec_path=data/demo/codec")
    with pytest.raises(SystemExit, match=r"text\.download=true"):
        refuse_missing(absent)
    refuse_missing(config(Path("google/flan-t5-xl"), cache, Path("x"), f"data.text_dir={store}"))


def test_the_embeddings_of_a_batch_are_asked_for_together(cache, store, monkeypatch) -> None:
    data = LatentDataModule(str(cache), 2.0, 4, text_dir=str(store)).datasets["train"]
    alone = [data[key] for key in (0, 1, 2)]
    asked: list[list[tuple[str, int, int]]] = []
    monkeypatch.setattr(data.text._reader, "prefetch", asked.append)
    together = data.__getitems__([0, 1, 2])
    assert [item.caption for item in together] == [item.caption for item in alone]
    assert all(torch.equal(item.context, one.context) for item, one in zip(together, alone, strict=True))
    read: list[tuple[str, int, int]] = []
    whole = data.text._reader.read
    monkeypatch.setattr(data.text._reader, "read", lambda *place: read.append(place) or whole(*place))
    for item in together:
        data.text.get(item.caption)
    assert [sorted(set(read))] == [sorted(places) for places in asked]


def test_loader_processes_read_the_embeddings(cache, store) -> None:
    data = LatentDataModule(str(cache), 2.0, 4, text_dir=str(store))
    batches = [next(iter(DataLoader(data.datasets["val"], 4, num_workers=n, collate_fn=data.collate))) for n in (0, 1)]
    for batch in batches:
        assert batch["context"].shape == (4, batch["context_mask"].shape[1], DIM)
        assert batch["context"].dtype == torch.bfloat16
        for caption, row, mask in zip(batch["caption"], batch["context"], batch["context_mask"], strict=True):
            assert torch.equal(row[mask], data.text.get(caption))
    assert torch.equal(batches[0]["context"], batches[1]["context"])


def test_masked_tokens_change_nothing_and_make_few_lengths(cache, store, t5) -> None:
    """The denoiser's prediction is that of the captions alone, in a batch of stored embeddings and online."""
    options = config(t5, cache, store).text
    data = LatentDataModule(str(cache), 2.0, 4, text_dir=str(store))
    batch = data.collate([data.datasets["val"][index] for index in range(4)])
    dropped = torch.tensor([True, False, False, True])
    plain, padded = (module_of(StoredText(str(store), {**options, "length_multiple": n})) for n in (1, 16))
    rows = [module.condition(batch, dropped) for module in (plain, padded)]
    assert [row.mask.shape[1] % 16 for row in rows] == [batch["context_mask"].shape[1] % 16, 0]
    assert batch["context_mask"].shape[1] % 16 > 0
    assert rows[0].mask.sum(dim=1).tolist() == rows[1].mask.sum(dim=1).tolist()
    assert rows[1].mask[dropped].sum(dim=1).tolist() == [1, 1]  # of the empty prompt
    online = {key: value for key, value in batch.items() if not key.startswith("context")}
    other = module_of(FrozenT5Conditioner(str(t5), DIM, length_multiple=16)).condition(online, dropped)
    assert torch.equal(other.mask, rows[1].mask)
    torch.testing.assert_close(other.embeddings, rows[1].embeddings.float(), rtol=8e-3, atol=1e-5)
    noisy, times = batch["latent"], torch.tensor([10, 300, 700, 999])
    predictions = [
        plain.denoiser(noisy, times, context=row.embeddings, context_mask=row.mask, frame_mask=None) for row in rows
    ]
    torch.testing.assert_close(*predictions, rtol=1e-5, atol=1e-5)


def module_of(text: nn.Module) -> DiffusionTraining:
    torch.manual_seed(0)
    denoiser = DiffusionTransformer(CHANNELS, 16, 2, 2, DIM, AdaLNSola(rank=2, alpha=2))
    stir(denoiser)  # layers that start at zero would hide the text
    return DiffusionTraining(denoiser, DiffusionProcess(), LatentNormaliser(CHANNELS), torch.optim.SGD, text).eval()


def test_an_encoder_that_samples_need_is_loaded_before_the_first_step(cache, store, t5, monkeypatch) -> None:
    options = config(t5, cache, store).text
    module = module_of(StoredText(str(store), options))
    loaded: list[list[str]] = []
    monkeypatch.setattr(module.text, "_encode_online", lambda prompts: loaded.append(prompts) or [torch.ones(2, DIM)])
    guidance = ClassifierFreeGuidance(3.0)
    samples = AudioSamples("codec", "samples", ["rain falls on a roof", "thunder"], 1.0, guidance)
    for _ in range(2):
        samples.on_fit_start(SimpleNamespace(is_global_zero=True, datamodule=None), module)
    assert loaded == [["thunder"]]


def test_the_command_encodes_the_captions_of_a_cache(cache, t5, tmp_path: Path) -> None:
    places = [f"captions={cache}", f"text.name_or_path={t5}", f"output_dir={tmp_path}", "prompts=[thunder]"]
    for part in (1, 0):
        run_command(
            "script/encode_text", "text=t5_base", "text.dim=16", *places, "device=cpu", "shards=2", f"shard={part}"
        )
    store = EmbeddingStore.open(tmp_path)
    assert len(store) == len(CAPTIONS) + CLIPS + 2  # and the empty one
    store.require(Texts.of(["thunder", *read_captions(str(cache))]))


def test_captions_are_read_from_tables_too(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("path,caption\na.wav,rain\nb.wav,a dog barks\n")
    (tmp_path / "clips.jsonl").write_text('{"path": "a.wav", "captions": ["rain", "a shower"]}\n')
    (tmp_path / "captions.txt").write_text("rain\na dog barks\n")
    read = {path.name: list(read_captions(str(path))) for path in tmp_path.iterdir()}
    assert read == {
        "clips.csv": ["rain", "a dog barks"],
        "clips.jsonl": ["rain", "a shower"],
        "captions.txt": ["rain", "a dog barks"],
    }
    (tmp_path / "clips.jsonl").write_text('{"path": "a.wav"}\n')
    with pytest.raises(ValueError, match=r"1 wrong line; mend or remove it:\n  line 1: `caption` must be text"):
        read_captions(str(tmp_path / "clips.jsonl"))
