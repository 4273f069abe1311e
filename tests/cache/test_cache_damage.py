"""Damage anywhere in a file: it is refused by name, or, where a format has room for a harmless change, reads as before."""

import random

import pyarrow as pa
import pytest
from score_rows import IDENTITY, about, bytes_of, capture, keys, rows, score

from pipeline.cache.folder import read_cache, write_cache
from pipeline.cache.store import Store
from pipeline.errors import CorruptError
from pipeline.files import check_manifest, write_manifest
from pipeline.schema import CONTEXTS, PREDICTIONS, TARGETS, examples_schema, read_table, write_table

TIMES = 40
DAMAGE = ("flipped bit", "truncated", "zeroed block", "longer")


def damaged(data: bytes, kind: str, dice: random.Random) -> bytes:
    """Change bytes as failing disks and cut copies do; the result differs."""
    changed, place = bytearray(data), dice.randrange(len(data))
    if kind == "flipped bit":
        changed[place] ^= 1 << dice.randrange(8)
    elif kind == "truncated":
        del changed[place:]
    elif kind == "zeroed block":
        end = min(len(data), place + dice.randrange(1, 512))
        changed[place:end] = bytes(end - place) if any(data[place:end]) else b"\xff" * (end - place)
    else:
        changed += dice.randbytes(dice.randrange(1, 64))
    return bytes(changed)


def table_of(schema: pa.Schema) -> pa.Table:
    """Twenty rows."""
    values = {
        pa.string(): lambda n: f"text {n}",
        pa.int64(): int,
        pa.float32(): lambda n: n / 7,
        pa.list_(pa.float32()): lambda n: [n / 9, 1.0],
    }
    return pa.table([pa.array([values[field.type](n) for n in range(20)], field.type) for field in schema], schema=schema)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(
    "schema", [examples_schema(["text"]), CONTEXTS, TARGETS, PREDICTIONS], ids=["examples", "contexts", "targets", "predictions"]
)
def test_a_damaged_table_is_refused_by_name_or_reads_as_before(tmp_path, schema, kind):
    dice, file, whole = random.Random(f"{schema} {kind}"), tmp_path / "table.parquet", table_of(schema)
    write_table(whole, file)
    data = file.read_bytes()
    for _ in range(TIMES):
        file.write_bytes(damaged(data, kind, dice))
        try:
            found = read_table(file, schema)
        except CorruptError as error:
            said = str(error)
        else:
            assert found.equals(whole)
            said = file.name
        assert file.name in said


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_always_refused_by_name(tmp_path, kind):
    dice, folder = random.Random(kind), tmp_path / "cache"
    write_cache(folder, [rows(12)], about())
    shard = folder / "part-00000.parquet"
    data = shard.read_bytes()
    for _ in range(TIMES):
        shard.write_bytes(damaged(data, kind, dice))
        with pytest.raises(CorruptError, match=r"part-00000\.parquet: sha256"):
            read_cache(folder)


@pytest.mark.parametrize("kind", DAMAGE)
def test_any_damaged_file_of_a_folder_that_travels_is_refused_by_name(tmp_path, kind):
    dice = random.Random(kind)
    for name in ("model.safetensors", "config.json", "seeds/1/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(dice.randbytes(700))
    write_manifest(tmp_path, {"name": "cd"})
    for _ in range(TIMES):
        file = dice.choice([file for file in sorted(tmp_path.rglob("*")) if file.is_file() and file.name != "manifest.json"])
        data = file.read_bytes()
        file.write_bytes(damaged(data, kind, dice))
        with pytest.raises(CorruptError, match=f"{file}: "):
            check_manifest(tmp_path)
        file.write_bytes(data)
    assert check_manifest(tmp_path)["name"] == "cd"


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.slow
def test_damage_to_any_file_of_the_store_changes_no_byte_of_the_cache(tmp_path, kind):
    dice = random.Random(kind)
    capture(tmp_path / "work", tmp_path / "cache", 9)
    before, store = bytes_of(tmp_path / "cache"), Store(tmp_path / "work", IDENTITY)
    for _ in range(TIMES // 4):
        file = dice.choice([*sorted(store.folder.glob("p*.parquet")), store.folder / "identity.json"])
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, kind, dice))
        capture(tmp_path / "work", tmp_path / "cache", 9)
        assert bytes_of(tmp_path / "cache") == before
    assert score(Store(tmp_path / "work", IDENTITY), keys(9)) == []
