import warnings

import pytest
import torch
from make_models import LENGTH, make_pipeline

from segresearch.models import load_model
from segresearch.models.text import TextEncoders
from segresearch.models.text_settings import TextSettings

PROMPTS = ["a red cube", "", "Two cubes, left!"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(diffusers pipeline, the same loaded here)."""
    folder = tmp_path_factory.mktemp("model") / "folder"
    pipeline = make_pipeline(folder)
    pipeline.save_pretrained(folder)
    return pipeline, load_model(folder)


def assert_equal_to_diffusers(conds, encoded):
    context, negative, pooled, negative_pooled = encoded
    for ours, theirs in (
        (conds["cond"].context, context),
        (conds["cond"].pooled, pooled),
        (conds["uncond"].context, negative),
        (conds["uncond"].pooled, negative_pooled),
    ):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
@pytest.mark.parametrize("negative", [None, "blue", ["blue", "", "a"]])
def test_encoding_is_that_of_diffusers(made, negative, clip_skip):
    if clip_skip == 2:  # the embeddings themselves
        assert made[1].text.layers == 3
    expected = made[0].encode_prompt(PROMPTS, negative_prompt=negative, clip_skip=clip_skip)
    found = made[1].encode(PROMPTS, negative, settings=TextSettings(clip_skip=clip_skip))
    assert_equal_to_diffusers(found, expected)


def test_no_negative_means_zeros_or_the_empty_text(made, tmp_path):
    conds = made[1].encode(PROMPTS)
    assert not conds["uncond"].context.any() and not conds["uncond"].pooled.any()
    made[0].register_to_config(force_zeros_for_empty_prompt=False)
    try:
        made[0].save_pretrained(tmp_path)
        expected = made[0].encode_prompt(PROMPTS)
    finally:
        made[0].register_to_config(force_zeros_for_empty_prompt=True)
    conds = load_model(tmp_path).encode(PROMPTS)
    assert conds["uncond"].context.any()
    assert_equal_to_diffusers(conds, expected)


def test_the_empty_prompt_is_encoded(made):
    conds = made[1].encode([""])
    assert conds["cond"].context.any()
    assert_equal_to_diffusers(made[1].encode(["a"], negative=""), made[0].encode_prompt(["a"], negative_prompt=[""]))
    torch.testing.assert_close(conds["cond"].context, made[1].encode(["a"], negative="")["uncond"].context)


def test_sizes_become_time_ids(made):
    sd = made[1]
    assert sd.encode(["a"])["cond"].time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]
    conds = sd.encode(["a", "b"], size=(24, 1000))
    ids = made[0]._get_add_time_ids((24, 1000), (0, 0), (24, 1000), torch.float32, 40)
    assert torch.equal(conds["cond"].time_ids, ids.expand(2, 6)) and torch.equal(
        conds["uncond"].time_ids, ids.expand(2, 6)
    )
    assert sd.latent_shape((24, 1000)) == (4, 12, 500)


def test_rows_do_not_depend_on_their_batch(made):
    together = made[1].encode(PROMPTS)["cond"]
    for i, prompt in enumerate(PROMPTS):
        alone = made[1].encode([prompt])["cond"]
        torch.testing.assert_close(together[[i]].context, alone.context, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together[[i]].pooled, alone.pooled, rtol=1e-5, atol=1e-6)


def test_a_long_prompt_is_cut_with_a_warning_that_names_what_is_lost(made):
    prompt = (
        "a a a a a a a a a a a a a red cube ball"  # "red" is one token, "cube" three: 13 + 1 fit beside begin and end
    )
    with pytest.warns(UserWarning, match="reads 16 tokens, cut off: 'cube ball'") as caught:
        conds = made[1].encode([prompt])
    assert len(caught) == 2  # one for each encoder
    assert conds["cond"].context.shape == (1, LENGTH, 192)
    assert_equal_to_diffusers(conds, made[0].encode_prompt([prompt]))
    with pytest.warns(UserWarning, match="cut off") as caught:
        made[1].encode(["red " * 5000])
    assert max(len(str(warning.message)) for warning in caught) < 500
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made[1].encode(["a a a a a a a a a a a a a red"])


def test_tokenizers_pad_as_sdxl_does(made):
    first, second = (made[1].text.tokens(["a"], which)[0].tolist() for which in (0, 1))
    assert first[:2] == second[:2] and first[2] == second[2] == 516
    assert set(first[3:]) == {516} and set(second[3:]) == {0}


def test_what_does_not_fit_is_refused(made):
    sd = made[1]
    for match, call in (
        ("prompts is empty", lambda: sd.encode([])),
        (r"not the string 'a cube': write \['a cube'\]", lambda: sd.encode("a cube")),
        ("negative has 1 texts for 2 prompts", lambda: sd.encode(["a", "b"], negative=["c"])),
        (r"size=\(16, 15\): .* multiples of 2", lambda: sd.encode(["a"], size=(16, 15))),
        (r"size=\(0, 16\)", lambda: sd.encode(["a"], size=(0, 16))),
        ("clip_skip=3: must lie between 0 and 2", lambda: sd.encode(["a"], settings=TextSettings(clip_skip=3))),
        ("clip_skip=-1", lambda: sd.encode(["a"], settings=TextSettings(clip_skip=-1))),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_a_tokenizer_of_another_model_is_refused(made, tmp_path):
    first, second = made[1].text.encoders
    tokenizer = made[0].tokenizer.from_pretrained(made[0].tokenizer.name_or_path)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="tokenizer 1 knows 518 tokens, text encoder 1 has 517"):
        TextEncoders((tokenizer, made[0].tokenizer_2), (first, second))
