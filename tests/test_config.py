"""Settings: what is read, what is refused, and the one line that says why."""

import re
from operator import attrgetter

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clipn.config.loading import base_config, load_config, save_config, to_dict
from clipn.config.schema import Config

SECTIONS = "run, world, model, data, features, train, eval, probe, tagood, adversarial, base"


@pytest.fixture
def write(tmp_path):
    """Write a config file and give its path."""
    path = tmp_path / "my_config.yaml"

    def _write(text: str):
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def message_of(path, *overrides: str) -> str:
    """The error of `load_config`, which is one line."""
    with pytest.raises(ValueError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert message and len(message.splitlines()) == 1
    return message


# What is read


def test_the_defaults_are_the_recipe_of_the_papers_code():
    train, data, model, evaluation = Config().train, Config().data, Config().model, Config().eval
    assert (train.epochs, train.batch_size, train.lr, train.weight_decay) == (10, 4 * 512, 3e-4, 0.2)
    assert (train.betas, train.eps, train.warmup_steps, train.objective) == ([0.9, 0.98], 1e-6, 0, "clipn")
    assert (data.crop_scale, data.flip, model.num_prompts) == ([0.9, 1.0], 0, 16)
    assert (evaluation.scale, evaluation.templates) == (100, "clipn-release")


def test_a_file_changes_only_what_it_names(write):
    expected = to_dict(Config())
    for text in ("", "# only a comment\n"):
        assert to_dict(load_config(write(text))) == expected
    expected["train"] |= {"lr": 1e-4, "epochs": 3}  # 1e-4 is a text in YAML 1.1
    expected["model"] |= {"num_prompts": 0}
    assert to_dict(load_config(write("train: {lr: 1e-4, epochs: 3}\nmodel: {num_prompts: 0}\n"))) == expected


def test_words_of_the_command_line_win_and_the_last_one_counts(write):
    path = write("train: {lr: 0.1, epochs: 3}\nrun: {dir: here}\n")
    config = load_config(path, ["train.lr=1e-3", "train.lr=1e-2", "run.dir=a=b", "model.pretrained=null"])
    assert (config.train.lr, config.train.epochs, config.run.dir, config.model.pretrained) == (1e-2, 3, "a=b", None)


TYPED_AS_IT_IS = ["a space", "2024_11_21", "0123", "1:30", "yes", "1e5", "a: b", "[x]", "null1", "a=b"]


@pytest.mark.parametrize(
    "word, value",
    [
        ("data.shards=[a.tar,b.tar]", ["a.tar", "b.tar"]),
        ("train.betas=[0.5,0.6]", [0.5, 0.6]),
        ("eval.class_names=[night owl, cat]", ["night owl", "cat"]),
        *((f"run.dir={name}", name) for name in TYPED_AS_IT_IS),
        *((f"data.shards=data/{name}", f"data/{name}") for name in ("{00000..00331}.tar", "*.tar")),
        *((f"run.device={name}", name) for name in ("cuda:1", "mps")),
    ],
)
def test_values_of_many_kinds(write, word, value):
    assert attrgetter(word.partition("=")[0])(load_config(write(""), [word])) == value


def test_one_key_refers_to_another_wherever_it_was_set(write):
    path = write("model: {pretrained: '${run.dir}/base/checkpoints/last.pt'}\nrun: {dir: there}\n")
    assert load_config(path).model.pretrained == "there/base/checkpoints/last.pt"
    assert load_config(path, ["run.dir=else where"]).model.pretrained == "else where/base/checkpoints/last.pt"
    assert load_config(path, ["run.dir=x"]).world.root == "x/world"


def test_image_sets_are_plain_dicts_and_lists_and_a_word_adds_one(write):
    config = load_config(write("eval: {id: {near: {path: p, classes: [a, b]}}, ood: [q, r]}"))
    assert config.eval.id == {"near": {"path": "p", "classes": ["a", "b"]}}
    assert type(config.eval.id["near"]) is dict and type(config.eval.ood) is list
    path = write("eval: {id: {cats: a}, ood: {dogs: b}}")
    assert load_config(path, ["eval.ood.owls=c"]).eval.ood == {"dogs": "b", "owls": "c"}
    for word, value in {"[c,d]": ["c", "d"], "{owls: c}": {"owls": "c"}, "c": "c"}.items():  # the whole setting
        assert load_config(path, [f"eval.ood={word}"]).eval.ood == value


def test_saved_settings_are_read_back(write, tmp_path):
    path = write(
        "run: {dir: 'döner/ünd', seeds: [1, 2]}\ndata: {shards: ['a/{0..3}.tar', 'b.tar']}\n"
        "model: {pretrained: '${run.dir}/x.pt', image_mean: [0.5, 0.5, 0.5]}\n"
        "eval: {id: {cats: {path: p, exclude: [a]}}, ood: [q], class_names: ['no', 'on', '1e3']}\n"
        "base: {train: {objective: clip, epochs: 2}}\n"
    )
    config = load_config(path)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert "${" not in (tmp_path / "saved.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text(encoding="utf-8")) == to_dict(config)


# The base's own run


def test_the_base_differs_key_by_key_and_has_its_own_folder(write):
    assert base_config(Config()) is None
    config = load_config(
        write(
            "run: {dir: runs/x, seed: 5, seeds: [5, 6]}\ntrain: {lr: 0.1, epochs: 9}\n"
            "model: {name: m.json, pretrained: '${run.dir}/base/checkpoints/last.pt'}\n"
            "eval: {id: a, ood: b}\n"
            "base: {train: {objective: clip, epochs: 2}, model: {pretrained: null}}\n"
        )
    )
    base = base_config(config)
    assert (base.train.objective, base.train.epochs, base.train.lr) == ("clip", 2, 0.1)
    assert (base.model.name, base.model.pretrained) == ("m.json", None)
    assert (base.run.dir, base.run.seed, base.run.seeds) == ("runs/x/base", 5, [])
    assert base.eval.id is None and base_config(base) is None
    assert config.train.epochs == 9, "the run itself is as it was"
    path = write("base: {train: {objective: clip}}\ntrain: {resume: some.pt}\n")
    assert base_config(load_config(path)).train.resume == "auto"
    assert base_config(load_config(path, ["base={}"])) is None


# What is refused


@pytest.mark.parametrize(
    "text, key, near, choices",
    [
        ("trian: {lr: 1}", "trian", "did you mean train?", SECTIONS),
        ("train: {learning_rate: 1}", "train.learning_rate", "", "lr, betas, eps"),
        ("train: {epoch: 1}", "train.epoch", "did you mean epochs?", "objective, epochs, batch_size"),
        ("base: {train: {lrr: 3}}", "train.lrr", "did you mean lr?", "objective, epochs, batch_size"),
        ("base: {trian: {lr: 3}}", "trian", "did you mean train?", SECTIONS),
    ],
)
def test_an_unknown_key_is_named_with_the_choices(write, text, key, near, choices):
    path = write(text)
    message = message_of(path)
    assert message.startswith(str(path))
    assert f"{key}: unknown key" in message and near in message and choices in message
    assert ("base" in message.split(key)[0]) == text.startswith("base")


WRONG = {  # what the message says is expected: the words
    "abc": "train.lr=abc",
    "1.5": "train.epochs=1.5",
    "": "train.betas=3 train.lr=.inf",
    "1 or more": "train.epochs=0 features.views=0 features.part_size=0 features.batch_size=0 train.micro_batch_size=0",
    "2 or more": "train.batch_size=1 data.num_pairs=1",
    "positive": "train.lr=0 train.lr=.nan eval.scale=0",
    "[0, 1)": "train.betas=[0.9,1.0]",
    "clipn": "train.objective=clp",
    "bf16": "train.precision=fp8",
    "cosine": "train.tso_kind=l1",
    "0 or more": "train.weight_decay=-0.1 model.num_prompts=-1 data.workers=-1",
    "0 or more, up to": "run.seed=-1 run.seeds=[0,-1] features.seed=-1 probe.seed=-1 adversarial.seed=-1",
    "cuda:N": "run.device=tpu",
    "folder": "run.dir='' features.dir=''",
    "toy": "world.name=tou",
    "three": "model.image_mean=[0.5]",
    "pattern": "data.shards=3",
    "low <= high": "data.crop_scale=[0.9,0.5]",
    "{}": "data.caption_templates=[photo]",
    "at least one": "data.caption_templates=[] eval.methods=[]",
    "probability": "data.flip=2",
    "features": "data.source=disk",
    "float16": "features.dtype=int8",
    "null, fp32": "features.precision=fp8",
    "fp32": "eval.precision=int8",
}


@pytest.mark.parametrize("expected, word", [(key, word) for key, words in WRONG.items() for word in words.split()])
def test_an_impossible_value_is_named_with_its_place(write, expected, word):
    key, value = word.split("=")
    section, name = key.split(".")
    path = write(f"{section}: {{{name}: {value}}}")
    message = message_of(path)
    assert message.startswith(f"{path}: ") and key in message and expected in message
    message = message_of(write(""), "run.dir=fine", word)
    assert message.startswith("command line") and key in message and expected in message
    assert path.name not in message


def test_an_impossible_value_in_base_is_reported_before_any_work(write):
    path = write("base: {train: {epochs: 0}}")
    message = message_of(path)
    assert message.startswith(str(path)) and "base" in message and "train.epochs=0" in message
    message = message_of(write(""), "base.train.epochs=0")
    assert message.startswith("command line") and "train.epochs=0" in message


@pytest.mark.parametrize("word, expected", [("data.source=features", "frozen"), ("train.micro_batch_size=2", "null")])
def test_settings_of_clipns_training_are_refused_for_clips_and_not_inherited_by_its_base(write, word, expected):
    key = word.partition("=")[0]
    message = message_of(write("train: {objective: clip}"), word)
    assert key in message and "train.objective=clip" in message and expected in message
    path = write("base: {train: {objective: clip}}")
    base = base_config(load_config(path, [word]))
    assert (base.data.source, base.train.micro_batch_size) == ("pairs", None)
    message = message_of(path, word, f"base.{word}")
    assert key in message and "base" in message


@pytest.mark.parametrize("text", ["train: 3", "train: [1]", "train: null", "train: fast"])
def test_a_section_with_one_value_is_named(write, text):
    path = write(text)
    message = message_of(path)
    assert message.startswith(str(path)) and re.search(r"\btrain\b", message.split("the sections are")[0])


HUGE = "0x" + "f" * 5000  # YAML reads it, Python does not write it in decimal
NO_CONFIGS = {
    "": [f"train: {HUGE}", f"[{HUGE}]", f"train: {{epochs: -{HUGE}}}", f"train: {{lr: {HUGE}}}", "run: {dir: '${'}"],
    SECTIONS: ["3", "hello", "[1, 2]", "- run: 1"],
    "not valid YAML": ["run: {dir: a", "a: b: c", "\t", "run: {a: 1}\nrun: {b: 1}\n", "&a [*a]"],
    "my_config.yaml: ": ["train: {lr: !!float abc}", "train: {epochs: !!int ''}", "run: {dir: !!bool maybe}"],
    "run.dir": ["run: {dir: '${nope}'}", "run: {dir: '${run.dir}'}"],
    "eval.ood": ["eval: {id: folder}"],
}


@pytest.mark.parametrize("expected, text", [(key, text) for key, texts in NO_CONFIGS.items() for text in texts])
def test_a_file_that_is_no_config_is_named(write, text, expected):
    path = write(text)
    message = message_of(path)
    assert message.startswith(str(path)) and expected in message and len(message) < 1000


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            load_config(path)


@pytest.mark.parametrize("word", ["fast", "=3", "--lr", ""])
def test_a_word_without_a_setting_is_reported_with_the_form(write, word):
    message = message_of(write(""), word)
    assert message.startswith("command line") and repr(word) in message and "key=value" in message


WRONG_WORDS = ["train.lrr=1", "lr=1", "train.lr.x=1", "train=3", "train.betas=[1", "run..dir=x"]
MANY_LINES = ["data=a\u2028b", "data=a\x1db", "train='a\n b'", "no=a\n b"]


@pytest.mark.parametrize("word", [*WRONG_WORDS, *MANY_LINES, "train.betas[0]=0.5"])
def test_a_wrong_word_is_quoted(write, word):
    message = message_of(write(""), word)
    assert message.startswith("command line") and word.split("\n")[0].split("[0]")[0].splitlines()[0] in message


# Any text

SCRAPS = ["run", "train", "base", "eval", "lr", "dir", ": ", "{", "}", "[", "]", "- ", "\n", "\n  ", "&a ", "*a", "${"]
SCRAPS += ["!!int ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "'", '"', "3", "x", "~", "<<", "???", "|", "\t"]
TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(SCRAPS), max_size=14).map("".join)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
@example(text="a: !!timestamp foo")
@example(text="a: !!int ''")
@example(text="a: !!bool maybe")
@example(text="[" * 3000)
@example(text="base: &a {x: *a}")
@example(text="base: '${base}'")
@example(text='"two\n\nlines": 3')
@example(text="null: 3")
@example(text="? [1]\n: 2")
@example(text="run: {dir: \ud800}")  # not in UTF-8
def test_any_text_loads_or_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        config = load_config(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert isinstance(config, Config)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(word=TEXTS | st.text(max_size=20).map(lambda text: f"train.lr={text}"))
@example(word="train.lr=!!timestamp foo")
def test_any_word_is_accepted_or_refused_in_one_line(tmp_path, word):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    try:
        assert isinstance(load_config(path, [word]), Config)
    except ValueError as error:
        assert "\n" not in str(error)
