"""Words that stand for learned vectors: equal to diffusers' load_textual_inversion; wrong files are named."""

import pytest
import torch
from make_models import VOCABULARY, make_pipeline
from safetensors.torch import save_file

from segresearch.errors import CheckpointError, InputError
from segresearch.models import load_model
from segresearch.models.text import expanded
from segresearch.models.text_settings import TextSettings

WIDTHS = {"clip_l": 64, "clip_g": 128}  # of the tiny model
PROMPTS = ["a red <toy>, cu", "<toy> <one>", "", "a plain text"]


def write(file, keys):
    save_file(keys, file)
    return file


def random_vectors(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {key: torch.randn(count, width, generator=draw) for key, width in WIDTHS.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """<toy> of three vectors, <one> of one, in a file each."""
    folder = tmp_path_factory.mktemp("words")
    counts = {"toy": 3, "one": 1}
    return {f"<{name}>": write(folder / f"{name}.safetensors", random_vectors(n, n)) for name, n in counts.items()}


@pytest.fixture(scope="module")
def loaded(folder, files):
    return load_model(folder, embeddings=files)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, files):
    """The same model and words in diffusers, pooled at the end-of-text token."""
    pipeline = make_pipeline(tmp_path_factory.mktemp("pipeline"))
    for word, n in (("<toy>", 3), ("<one>", 1)):
        vectors = random_vectors(n, n)
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            pipeline.load_textual_inversion(
                vectors[key], token=word,
                text_encoder=getattr(pipeline, f"text_encoder{end}"), tokenizer=getattr(pipeline, f"tokenizer{end}"),
            )  # fmt: skip
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        body = getattr(encoder, "text_model", encoder)
        body.eos_token_id = pipeline.tokenizer.eos_token_id
    return pipeline


def test_equal_to_diffusers(loaded, pipeline):
    context, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    cond = loaded.encode(PROMPTS, size=(16, 16))["cond"]
    torch.testing.assert_close(cond.context, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cond.pooled, pooled, rtol=1e-5, atol=1e-5)


def test_the_words_are_their_vectors(loaded):
    for which, key in enumerate(WIDTHS):
        ids = loaded.text.tokens(["red <toy> <one>"], which)[0]
        added = ids[ids >= VOCABULARY].tolist()
        assert len(added) == 4 and len(set(added)) == 4
        encoder = loaded.text.encoders[which]
        matrix = getattr(encoder, "text_model", encoder).embeddings.token_embedding.weight
        assert len(matrix) == VOCABULARY + 4 == encoder.config.vocab_size
        torch.testing.assert_close(matrix[added], torch.cat([random_vectors(3, 3)[key], random_vectors(1, 1)[key]]))


def test_other_texts_and_the_model_without_words_stay(folder, loaded, model):
    """Also the pooled vector, which is then taken at the end-of-text token and no longer at the highest id."""
    plain = ["a plain red text", "", "toy"]
    for ours, theirs in zip(loaded.encode(plain, size=(16, 16)).values(), model.encode(plain, size=(16, 16)).values()):
        assert torch.equal(ours.context, theirs.context) and torch.equal(ours.pooled, theirs.pooled)
    assert len(model.text.tokenizers[0]) == VOCABULARY and not model.text.words
    again = load_model(folder)
    assert len(again.text.tokenizers[0]) == VOCABULARY
    assert torch.equal(again.encode(PROMPTS)["cond"].context, model.encode(PROMPTS)["cond"].context)


def test_pooled_at_the_end_of_the_text(loaded):
    """Not at the word, whose token has a higher id: a text that only goes on after the word pools otherwise."""
    short, long = loaded.encode(["<toy> a", "<toy> a red cube"], size=(16, 16))["cond"].pooled
    assert (short - long).abs().max() > 1e-3


def test_in_a_weighted_prompt(loaded):
    plain = loaded.encode(["a <toy> red"], size=(16, 16))["cond"]
    texts, weighted = ["a <toy> red", "a (<toy>:1.5) red"], TextSettings(syntax="weighted")
    weighted = loaded.encode(texts, size=(16, 16), settings=weighted)["cond"]
    torch.testing.assert_close(weighted.context[:1], plain.context)
    ratio = (weighted.context[1] / plain.context[0])[:, :64].median(dim=1).values  # of each token in the first encoder
    torch.testing.assert_close(ratio[2:5] / ratio[1], torch.full((3,), 1.5), rtol=1e-3, atol=1e-3)


def test_expanded():
    words = {"<toy>": 3, "Best": 2, "one": 1}
    assert expanded("a <toy>, <TOY>", words) == "a <toy> <toy>_1 <toy>_2, <toy> <toy>_1 <toy>_2"
    assert expanded("best one", words) == "Best Best_1 one"
    assert expanded("a <toy>", {}) == "a <toy>"
    assert expanded("foobar foo", {"foo": 2, "foobar": 2}) == "foobar foobar_1 foo foo_1"


def test_files_of_diffusers_one_an_encoder(folder, loaded, tmp_path):
    toy = random_vectors(3, 3)
    first = write(tmp_path / "learned_embeds.safetensors", {"<toy>": toy["clip_l"]})
    second = write(tmp_path / "learned_embeds_2.safetensors", {"<toy>": toy["clip_g"]})
    one = random_vectors(1, 1)
    keys = {"text_encoders_0": one["clip_l"][0], "text_encoders_1": one["clip_g"]}
    single = write(tmp_path / "one.safetensors", keys)
    sd = load_model(folder, embeddings=[first, second, f"{single}:<one>"])
    expected = loaded.encode(PROMPTS, size=(16, 16))["cond"]
    assert torch.equal(sd.encode(PROMPTS, size=(16, 16))["cond"].context, expected.context)
    with pytest.raises(CheckpointError, match="'<toy>' has no vectors for text encoder 2: give the file for each"):
        load_model(folder, embeddings=[first])
    with pytest.raises(InputError, match="'<toy>' has vectors for text encoder 1 already"):
        load_model(folder, embeddings={"<toy>": [first, first]})


def test_the_name_of_a_file_is_its_word(folder, tmp_path):
    file = write(tmp_path / "EasyNegative.safetensors", random_vectors(2))
    sd = load_model(folder, torch.bfloat16, embeddings=[file])
    a, b = sd.encode(["easynegative", "EASYNEGATIVE"], size=(16, 16))["cond"].context
    assert torch.equal(a, b) and a.dtype == torch.bfloat16
    assert (sd.text.tokens(["a easynegative"], 0)[0] >= VOCABULARY).sum() == 2


@pytest.mark.parametrize(
    "keys, word, message",
    [
        ({"emb_params": torch.zeros(2, 768)}, "x", "emb_params is 768 wide .Stable Diffusion 1., the model's text en"),
        ({"clip_l": torch.zeros(2, 128), "clip_g": torch.zeros(2, 64)}, "x", "clip_g is 64 wide"),
        ({"clip_l": torch.zeros(2, 64), "clip_g": torch.zeros(3, 128)}, "x", "2 vectors for one text encoder and 3"),
        ({"emb_params": torch.zeros(2, 64)}, "<x>", "'<x>' has no vectors for text encoder 2"),
        ({"clip_l": torch.full((1, 64), torch.nan), "clip_g": torch.zeros(1, 128)}, "x", "not finite"),
        ({"clip_l": torch.zeros(2, 2, 64)}, "x", "not vectors of a textual inversion"),
        ({"clip_l": torch.zeros(2, 64, dtype=torch.int8)}, "x", "is I8 .* not vectors"),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "x", "is not a textual inversion .its first key is 'a'"),
        (random_vectors(1), "red", "'red' is a token already: give it another, such as <red-1>"),
        (random_vectors(1), "two words", "one word without spaces"),
    ],
)  # fmt: skip
def test_what_is_refused(folder, tmp_path, keys, word, message):
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder, embeddings={word: write(tmp_path / "x.safetensors", keys)})
    assert "\n" not in str(caught.value)


def test_pickles_are_refused(folder, tmp_path):
    for name in ("learned_embeds.bin", "toy.pt"):
        (tmp_path / name).write_bytes(b"\x80\x02")
        with pytest.raises(CheckpointError, match="pickle checkpoints can run code"):
            load_model(folder, embeddings={"<toy>": tmp_path / name})
