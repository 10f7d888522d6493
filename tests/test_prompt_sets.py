"""Prompts from the files of published sets: each form as its authors write it, and what is wrong with a file."""

import pytest

from segresearch.config.expand import read_prompts
from segresearch.errors import ConfigError

FORMS = {
    "PartiPrompts.tsv": 'Prompt\tCategory\tNote\nbond\tAbstract\tx\na "red" cube, left\tWorld\t\n',
    "drawbench.csv": 'Prompts,Category\nbond,Colors\n"a ""red"" cube, left",Colors\n\n',
    "evaluation_metadata.jsonl": '{"tag": "x", "prompt": "bond"}\n\n{"prompt": "a \\"red\\"  cube, left"}\n',
    "captions.CSV": "id,Text\n1,bond\n2, \n3,\"a \"\"red\"\" cube, left\"\n",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_set_gives_its_prompts_in_order(name, tmp_path):
    path = tmp_path / name
    path.write_text(FORMS[name], encoding="utf-8")
    assert read_prompts(str(path)) == ("bond", 'a "red" cube, left')


# heads, keys and kinds of lines as they stand in the published files
PUBLISHED = {
    "PartiPrompts.tsv": (
        "Prompt\tCategory\tChallenge\tNote\r\nbond\tAbstract\tBasic\tconcepts with multiple meanings\r\n"
        'A sign that says "Diffusion"\tWorld Knowledge\tWriting & Symbols\t\r\n',
        ("bond", 'A sign that says "Diffusion"'),
    ),
    "drawbench.csv": (
        'Prompts,Category\nA red colored car.,Colors\n"A cat on the left, and a dog on the right.",Positional\n'
        "Hovering cow abducting aliens.,Conflicting\n",
        ("A red colored car.", "A cat on the left, and a dog on the right.", "Hovering cow abducting aliens."),
    ),
    "evaluation_metadata.jsonl": (
        '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'
        '{"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "sink", "count": 1, '
        '"color": "green"}], "prompt": "a photo of a red cup and a green sink"}\n',
        ("a photo of a bench", "a photo of a red cup and a green sink"),
    ),
    "captions_val2014.json": (
        '{"info": {"year": 2014}, "images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}], '
        '"licenses": [], "annotations": [{"image_id": 42, "id": 9, "caption": "A shoe rack."}, '
        '{"image_id": 7, "id": 3, "caption": "A bike\\nby a wall. "}, '
        '{"image_id": 42, "id": 2, "caption": "Shoes, and a dog."}]}',
        ("A bike by a wall.", "Shoes, and a dog.", "A shoe rack."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_as_they_are(name, tmp_path):
    text, prompts = PUBLISHED[name]
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(str(tmp_path / name)) == prompts


WRONG = [
    ("a.tsv", "Category\tNote\nx\ty\n", "line 1: none of prompt, prompts, caption, text among 'Category', 'Note'"),
    ("a.csv", "", "line 1: none of prompt, prompts, caption, text among none"),
    ("a.tsv", "Note\tPrompt\nonly\n", "line 2: 1 columns, its head has 2"),
    ("a.jsonl", '{"prompt": "x"}\n{"prompt"', "line 2: not JSON"),
    ("a.jsonl", "[1]\n", "line 1: not an object but list"),
    ("a.jsonl", '{"prompt": 3}\n', "line 1: its prompt is 3, not a text"),
    ("a.csv", "prompt\n", "no prompt in"),
    ("a.jsonl", "[" * 100_000, "line 1: not JSON that can be read"),
    ("a.jsonl", '{"prompt": 1' + "0" * 5000 + "}", "line 1: not JSON that can be read"),
]


@pytest.mark.parametrize(("name", "text", "words"), WRONG)
def test_what_is_wrong_with_a_file_is_said_in_one_line(name, text, words, tmp_path):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_prompts(str(path), "prompts")
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_set_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(str(tmp_path / "none.tsv"))
