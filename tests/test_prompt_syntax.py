"""Weights and BREAK in prompts against a slow reference, and what becomes of other programs' syntax."""

import warnings

import pytest
import torch

from segresearch.errors import InputError
from segresearch.models.prompt_syntax import chunks, encode_weighted, equal_lengths, foreign_syntax, parsed
from segresearch.models.text_settings import TextSettings


@pytest.mark.parametrize(
    "text, expected",
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[unbalanced", [("unbalanced", 1 / 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        (r"back\\slash", [("back\\slash", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("unbalanced) and ]", [("unbalanced) and ]", 1.0)]),
        ("a ratio of 3:2", [("a ratio of 3:2", 1.0)]),
        ("3:2) there", [("3:2) there", 1.0)]),
        ("(a : .5 )", [("a ", 0.5)]),
        ("(a:-1)", [("a", -1.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0), ("house", 1.3 * 1.1**2), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
                (", sun, ", 1.1), ("sky", 1.1**4), (".", 1.1),
            ],
        ),
        ("", []),
    ],
)  # fmt: skip
def test_weights_as_published(text, expected):
    """The examples of the web UI's own parser, and its other rules."""
    (part,) = parsed(text)
    assert [words for words, _ in part] == [words for words, _ in expected]
    assert [weight for _, weight in part] == pytest.approx([weight for _, weight in expected])


def test_break():
    assert parsed("a BREAK (b BREAK c:2) d") == [[("a ", 1.0)], [(" ", 1.0), ("b ", 2.0)], [(" c", 2.0), (" d", 1.0)]]
    assert parsed("BREAKER") == [[("BREAKER", 1.0)]] and parsed("BREAK") == [[], []]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a <lora:detail:0.8> cat", "'<lora:detail:0.8>' has no meaning in a weighted prompt: .* model.loras"),
        ("<lyco:x:1>", "model.loras"),
        ("<hypernet:x:1>", "hypernetworks are not supported"),
        ("a embedding:easy, b", "'embedding:easy' has no meaning .* model.embeddings"),
        ("[cat:dog:0.5]", "change between steps"),
        ("[dog:5]", "change between steps"),
        ("[cat|dog]", "alternate between steps"),
        ("a cat AND a dog", "'AND' has no meaning .*guidance=composed"),
    ],
)
def test_what_is_a_setting_elsewhere(text, words):
    with pytest.raises(InputError, match=words) as error:
        parsed(text)
    assert "\n" not in str(error.value)


def test_weights_are_no_steps():
    assert parsed("[(red:1.5) ball]") == [[("red", 1.5 / 1.1), (" ball", 1 / 1.1)]]


def reference(sd, text):
    """States and pooled text of one prompt, token by token and chunk by chunk."""
    text_encoders, whole = sd.text, []
    for which, tokenizer in enumerate(text_encoders.tokenizers):
        room, rows = text_encoders.length - 2, []
        for part in parsed(text):
            tokens = [(t, w) for words, w in part for t in tokenizer(words, add_special_tokens=False).input_ids]
            while True:
                some, tokens = tokens[:room], tokens[room:]
                rows.append(some)
                if not tokens:
                    break
        states = []
        for some in rows:
            ids = [tokenizer.bos_token_id] + [t for t, _ in some] + [tokenizer.eos_token_id]
            ids += [tokenizer.pad_token_id] * (text_encoders.length - len(ids))
            out = text_encoders.encoders[which](torch.tensor([ids]), output_hidden_states=True)
            z = out.hidden_states[-2][0].clone()
            before = z.mean()
            for position, (_, weight) in enumerate(some, 1):
                z[position] *= weight
            states.append(z * before / z.mean() if any(w != 1 for _, w in some) else z)
            pooled = out.text_embeds[0] if which and len(states) == 1 else (pooled if states[1:] else None)
        whole.append(torch.cat(states))
    return torch.cat(whole, dim=-1), pooled


TEXTS = ["(red:1.5) cube", "a [blue] ((cone)) BREAK green", "red", "one (two:0.5) three BREAK four five BREAK (six:2)"]


@torch.no_grad()
def test_states_against_the_slow_reference(model):
    context, pooled = encode_weighted(model.text, TEXTS)
    for i, text in enumerate(TEXTS):
        states, first = reference(model, text)
        repeated = states.repeat(context.shape[1] // len(states), 1)
        torch.testing.assert_close(context[i], repeated, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled[i], first, rtol=1e-4, atol=1e-5)
    assert context.shape[1] == 6 * model.text.length  # of one, two and three chunks


def test_without_weights_it_is_the_plain_text(model):
    texts = ["red", "", "a cube"]
    for weighted, plain in zip(encode_weighted(model.text, texts), model.text.encode(texts)):
        torch.testing.assert_close(weighted, plain)


def test_a_long_text_goes_on_in_the_next_chunk(model):
    tokenizer, length = model.text.tokenizers[0], model.text.length
    parts = chunks(tokenizer, "a b c d e f g h i j k l m n o p q r s", length)
    ids = [token for row, _ in parts for token in row[1:-1]][:19]
    assert [len(row) for row, _ in parts] == [length] * 2
    assert ids == tokenizer("a b c d e f g h i j k l m n o p q r s", add_special_tokens=False).input_ids
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in row for row, _ in parts)


@torch.no_grad()
def test_repeated_chunks_are_not_seen(model):
    """The denoised image of a text does not depend on how often its context is repeated."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    conds = model.encode(["red cube"])
    longer = equal_lengths({**conds, "other": encoded(model, ["a BREAK b BREAK c"])})
    assert longer["cond"].context.shape[1] == 3 * conds["cond"].context.shape[1]
    found = [model.denoiser(x, torch.tensor([3.0]), cond=c) for c in (conds["cond"], longer["cond"])]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def encoded(model, texts):
    return model.encode(texts, settings=TextSettings(syntax="weighted"))["cond"]


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(model):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 3
    whole = encoded(model, TEXTS)
    for i, text in enumerate(TEXTS):
        together = model.denoiser(x, torch.tensor([3.0]), cond=whole[i : i + 1])
        alone = model.denoiser(x, torch.tensor([3.0]), cond=encoded(model, [text]))
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_negatives_have_their_own_weights(model):
    conds = model.encode(["a BREAK b"], negative="(c:1.4)", settings=TextSettings(syntax="weighted"))
    length = model.text.length
    assert conds["cond"].context.shape[1] == conds["uncond"].context.shape[1] == 2 * length
    alone = model.encode(["(c:1.4)"], settings=TextSettings(syntax="weighted"))["cond"].context
    torch.testing.assert_close(conds["uncond"].context, alone.repeat(1, 2, 1))
    zeros = model.encode(["a BREAK b"], settings=TextSettings(syntax="weighted"))["uncond"]
    assert zeros.context.shape[1] == 2 * length and not zeros.context.any()


@pytest.mark.parametrize(
    "text, forms",
    [
        ("a (red:1.5) cat", "(word:1.5)"), ("a ((red)) cat", "(word)"), ("a [red] cat", "[word]"),
        ("a BREAK b", "BREAK"), ("a <lora:x:0.8>", "<lora:name:1>"), ("embedding:easy", "embedding:name"),
    ],
)  # fmt: skip
def test_plain_says_what_it_reads_as_text(model, text, forms):
    assert foreign_syntax(["plain", text]) == [forms]
    with pytest.warns(UserWarning) as caught:
        plain = model.encode([text])["cond"]
    (line,) = [str(w.message) for w in caught if "cut off" not in str(w.message)]
    assert forms in line and 'syntax="weighted"' in line and "text.syntax=weighted" in line and "\n" not in line
    torch.testing.assert_close(plain.context, model.text.encode([text])[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(["3:2, <3"], negative="\\(text\\)")


def test_an_unknown_syntax(model, unchecked):
    with pytest.raises(InputError, match="syntax='compel': choose plain or weighted"):
        model.encode(["a"], settings=TextSettings(syntax="compel"))
