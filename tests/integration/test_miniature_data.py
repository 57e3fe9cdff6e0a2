"""data/ is a function of tools/make_miniature: the fast part is generated again and compared byte for byte."""

import hashlib
import sqlite3
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
FAST = ("danbooru2023.db", "images", "tokenizer", "tokenizer_2", "references")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of the fast part, by its path."""
    files = [
        file
        for part in FAST
        for file in ([folder / part] if (folder / part).is_file() else sorted((folder / part).rglob("*")))
    ]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def database():
    connection = sqlite3.connect(f"file:{DATA / 'danbooru2023.db'}?mode=ro", uri=True)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def members():
    """post id → (tar number, name, size)"""
    found = {}
    for path in sorted((DATA / "images").glob("data-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                found[int(Path(member.name).stem)] = (int(path.stem[5:]), member.name, member.size)
    return found


@pytest.mark.slow
def test_the_fast_part_of_data_is_generated_byte_for_byte(tmp_path):
    parts = ["--part", "collection", "--part", "references"]
    subprocess.run([sys.executable, ROOT / "tools" / "make_miniature", *parts, "--out", tmp_path], check=True)
    assert digests(tmp_path) == digests(DATA)


def test_everything_together_stays_under_25_megabytes():
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) < 25_000_000


def test_posts_cover_the_real_ranges_years_and_ratings(database):
    counts = Counter(
        3 if id > 7_000_000 else 2 if id >= 5_000_000 else 1 if id >= 3_000_000 else 0
        for (id,) in database.execute("SELECT id FROM post")
    )
    assert counts[0] == counts[1] == 900 and counts[2] + counts[3] == 1200 and counts[3] > 50
    years = {created[:4] for (created,) in database.execute("SELECT created_at FROM post")}
    assert {str(year) for year in range(2005, 2026)} <= years and {"", "unkn"} <= years
    assert {rating for (rating,) in database.execute("SELECT rating FROM post")} == {None, 0, 1, 2, 3}
    assert {type for (type,) in database.execute("SELECT type FROM tag")} == {0, 1, 2, 3, 4}


def test_every_quality_of_every_rating_occurs_and_thresholds_are_hit(database):
    from make_miniature.posts import QUALITY_ABOVE

    for rating, above in enumerate(QUALITY_ABOVE):
        favourites = [count for (count,) in database.execute("SELECT fav_count FROM post WHERE rating = ?", (rating,))]
        assert {sum(count > limit for limit in above) for count in favourites} == set(range(7))
        assert set(above) & set(favourites)


def test_the_awkward_posts_are_there(database, members):
    rows = database.execute("SELECT id, md5, file_ext, is_deleted, is_banned FROM post").fetchall()
    missing = [row for row in rows if row[0] not in members]
    assert any(row[3] for row in missing) and any(row[4] for row in missing) and any(row[1] is None for row in missing)
    assert {"gif", "mp4", "webm", "zip", "swf"} <= {row[2] for row in missing}
    assert any(row[1] and row[2] in ("jpg", "png") and not row[3] and not row[4] for row in missing)
    assert any(row[3] and row[0] in members for row in rows) and any(row[4] and row[0] in members for row in rows)
    assert 0 in {size for _, _, size in members.values()} and 14 in {size for _, _, size in members.values()}
    (duplicates,) = database.execute(
        "SELECT count(*) FROM (SELECT 1 FROM posttagrelation GROUP BY post_id, tag_id HAVING count(*) > 1)"
    ).fetchone()
    (untagged,) = database.execute(
        "SELECT count(*) FROM post WHERE id NOT IN (SELECT post_id FROM posttagrelation)"
    ).fetchone()
    assert duplicates > 10 and untagged > 3


def test_tars_have_danboorus_layout(members):
    assert {number for number, _, _ in members.values()} == {4, 137, 512, 999, 1004, 1137, 1512, 1999, 2000}
    assert all(number == 2000 or number % 1000 == id % 1000 for id, (number, _, _) in members.items())
    folders = {number for number, name, _ in members.values() if "/" in name}
    assert folders and min(folders) >= 1000


def test_tokenizers_load_and_know_the_tags():
    from transformers import CLIPTokenizer

    for folder in ("tokenizer", "tokenizer_2"):
        tokens = CLIPTokenizer(vocab=str(DATA / folder / "vocab.json"), merges=str(DATA / folder / "merges.txt"))
        assert len(tokens) == 1000 and tokens.eos_token_id == 999 and tokens.bos_token_id == 998
        assert tokens.convert_ids_to_tokens(tokens("1girl, masterpiece")["input_ids"]) == [
            "<|startoftext|>",
            "1</w>",
            "girl</w>",
            ",</w>",
            "masterpiece</w>",
            "<|endoftext|>",
        ]
        assert (
            tokens.decode(tokens("Ünseen ^_^ 猫")["input_ids"], skip_special_tokens=True).replace(" ", "")
            == "ünseen^_^猫"
        )


def test_parents_share_the_donors_autoencoder_and_have_other_embeddings():
    from kohaku_delta.formats import safetensors_io

    def content(name):
        with safetensors_io.open_file(DATA / "checkpoints" / f"{name}.safetensors") as file:
            return {key: file.read(key) for key in file.specs}

    donor, *parents = map(content, ("sdxl", "beta", "gamma"))
    for parent in parents:
        assert set(parent) == set(donor)
        same = {key for key in donor if (parent[key] == donor[key]).all()}
        assert {key for key in donor if key.startswith("first_stage_model.")} <= same
        assert (
            not {
                key
                for key in donor
                if "embedding" in key and key.startswith("conditioner") and not key.endswith("position_ids")
            }
            & same
        )
    assert (parents[0]["model.diffusion_model.out.2.weight"] != parents[1]["model.diffusion_model.out.2.weight"]).any()


@pytest.mark.parametrize("size, stride, padding", [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0)])
def test_the_generators_convolution_has_torchs_values_and_derivatives(size, stride, padding):
    import torch

    from make_miniature import portable_products

    _, convolution, _ = portable_products.functions()
    numbers = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=numbers, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 9, 7), (4, 3, size, size))
    )
    assert torch.allclose(
        convolution.apply(x, weight, stride, padding),
        torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding),
    )
    assert torch.autograd.gradcheck(lambda *both: convolution.apply(*both, stride, padding), (x, weight))


def test_the_generators_attention_has_torchs_values_and_derivatives():
    import torch

    from make_miniature import portable_products

    _, _, attention = portable_products.functions()
    numbers = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((1, 2, length, 3), generator=numbers, dtype=torch.float64, requires_grad=True)
        for length in (4, 5, 5)
    )
    assert torch.allclose(
        attention.apply(query, key, value, None, 3**-0.5),
        torch.nn.functional.scaled_dot_product_attention(query, key, value),
    )
    assert torch.autograd.gradcheck(lambda *three: attention.apply(*three, None, 3**-0.5), (query, key, value))


def test_the_generators_adam_is_torchs():
    import torch

    from make_miniature.muon import Adam

    start = torch.randn((7, 5), generator=torch.Generator().manual_seed(0))
    ours, theirs = (start.clone().requires_grad_(True) for _ in range(2))
    adam, reference = Adam([ours], (0.9, 0.98)), torch.optim.Adam([theirs], lr=3e-3, betas=(0.9, 0.98), eps=1e-10)
    for step in range(20):
        for each in (ours, theirs):
            each.grad = None
            (each.sin() * (step + 1)).sum().backward()
        adam.step(3e-3)
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6) and not torch.allclose(ours, start, atol=1e-2) and ours.grad is None


@pytest.mark.parametrize("flip, shift", [(True, 0), (False, 1)])
def test_the_generators_sinusoids_are_diffusers(flip, shift):
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    from make_miniature.portable_math import square_root, standard_deviation, timestep_embedding

    times = torch.tensor([0, 1, 57, 500, 999])
    assert torch.allclose(
        timestep_embedding(times, 24, flip, shift), get_timestep_embedding(times, 24, flip, shift), atol=2e-4
    )
    values = torch.rand((4, 3, 5), generator=torch.Generator().manual_seed(0))
    assert (
        torch.allclose(square_root(values), values.sqrt())
        and torch.allclose(standard_deviation(values), values.std())
        and torch.allclose(standard_deviation(values, (0, 2)), values.std(dim=(0, 2)))
    )


@pytest.mark.parametrize("name", ["sdxl", "beta", "gamma"])
def test_pins_of_the_miniature_are_those_of_data(name):
    from ruamel.yaml import YAML

    pin = YAML(typ="safe").load((ROOT / "miniature" / "params.yaml").read_text("utf-8"))["download"]["inputs"][name]
    content = (DATA / "checkpoints" / f"{name}.safetensors").read_bytes()
    assert (pin["bytes"], pin["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
