"""What is recorded of trainings that were given a picture, and what the gate says of their versions."""

from contextlib import contextmanager
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric import ec

from pipelines import tracking
from pipelines.config import compose
from pipelines.presentation.progress import Silent
from pipelines.registry import Gate, Trust, Verdict
from pipelines.registry.forgotten import ForgetRecord, forgotten_row, read_records, record_of, write_record
from pipelines.registry.verdict import VerdictLog
from pipelines.signing import Authority, Signer
from pipelines.signing.keys import public_key
from pipelines.storage import Storage
from pipelines.tracking import ModelVersion
from tests.pipelines.signing.authority import write_key

STORAGE = Storage()
A, B, C = "a" * 32, "b" * 32, "c" * 32
RECORD = ForgetRecord("f" * 64, ("1" * 64, "2" * 64), "2026-01-01T00:00:00+00:00", "", {A: 40})


def authority(folder, name):
    key = write_key(folder / f"{name}.pem", ec.generate_private_key(ec.SECP256R1()))
    return Authority(Signer(key), Trust((public_key(key),)))


def version(run_id, images_seen, **tags):
    return ModelVersion("m", "1", run_id, {"run_id": run_id, "images_seen": str(images_seen), **tags}, ())


def test_a_request_of_the_same_images_adds_to_the_record_and_a_repeat_changes_nothing(tmp_path):
    own, root = authority(tmp_path, "own"), f"file://{tmp_path}/root"
    assert write_record(RECORD, root, STORAGE, own) == RECORD
    (path,) = (tmp_path / "root/forgotten").glob("*.json")
    before = path.read_bytes()
    write_record(RECORD, root, STORAGE, own)
    assert path.read_bytes() == before
    later = replace(RECORD, at="2026-02-02", trainings={A: 50, B: -1})
    assert write_record(later, root, STORAGE, own) == replace(RECORD, trainings={A: 40, B: -1})
    assert read_records(root, STORAGE, own.trust) == [replace(RECORD, trainings={A: 40, B: -1})]


def test_a_record_that_nobody_who_is_trusted_has_signed_says_nothing(tmp_path):
    own, stranger, root = authority(tmp_path, "own"), authority(tmp_path, "other"), f"file://{tmp_path}/root"
    write_record(RECORD, root, STORAGE, stranger)
    assert read_records(root, STORAGE, own.trust) == []
    assert write_record(RECORD, root, STORAGE, own) == RECORD
    assert read_records(root, STORAGE, own.trust) == [RECORD]
    (path,) = (tmp_path / "root/forgotten").glob("*.json")
    path.with_name("copy.json").write_bytes(path.read_bytes())
    assert read_records(root, STORAGE, own.trust) == [RECORD]


def test_versions_are_concerned_from_the_first_ordinal_on_and_by_the_model_that_they_began_from():
    records = [replace(RECORD, trainings={A: 40, B: -1})]

    def concerned(found):
        return record_of(found, found.tags, records) is not None

    assert [concerned(version(A, seen)) for seen in (0, 40, 41)] == [False, False, True]
    assert concerned(version(B, 0))
    assert not concerned(version(C, 1000))
    assert concerned(version(C, 10, init_from=f"runs:/{A}/64"))
    assert concerned(version(C, 10, init_from=f"runs:/{A}"))
    assert not concerned(version(C, 10, init_from=f"runs:/{A}/32"))
    earlier = {"init_from": "models:/m@champion", "init_from_origins": f"runs:/{'d' * 32}/8 runs:/{A}/{{}}"}
    for images, found in ((64, True), (32, False)):  # of a model that was tuned from one that had been given it
        tags = {name: value.format(images) for name, value in earlier.items()}
        assert concerned(version(C, 10, **tags)) is found


def test_the_line_of_the_gate_refuses_unless_it_is_set_to_warn():
    refused, warned = forgotten_row(RECORD, refuse=True), forgotten_row(RECORD, refuse=False)
    assert (refused.passed, warned.passed) == (False, True)
    assert RECORD.id in refused.figure


def test_a_rollback_passes_over_versions_that_had_been_given_the_picture(home, tmp_path, monkeypatch):
    made = [
        replace(version(run, seen, served_digest=n), version=n)
        for n, run, seen in (("1", C, 100), ("2", A, 30), ("3", A, 60), ("4", A, 90))
    ]
    moved = []
    monkeypatch.setattr(
        tracking,
        "version",
        lambda uri, name, *, alias=None, number=None: next((each for each in made if each.version == number), None),
    )
    monkeypatch.setattr(tracking, "set_alias", lambda uri, name, alias, number: moved.append((alias, number)))
    config = compose(["+experiment=digits", f"storage.root=file://{tmp_path}", "tracking.uri=http://mlflow"])
    own = Authority.of(config.registry)
    log = VerdictLog.of(config.storage.root, "m", "champion", STORAGE, own.trust)
    for number, each in enumerate(made):
        passed = Verdict(True, "better", "m", "champion", each.version, served_digest=each.version)
        assert log.add(passed, own.signer, number)
    write_record(RECORD, config.storage.root, STORAGE, own)
    gate = Gate(config, Silent(), lambda: None, "m", "champion")

    class Opened:
        wrong = None
        evidence = type("Evidence", (), {"served_digest": "2", "content_digest": "2"})

    @contextmanager
    def opened(self, version):
        yield Opened

    monkeypatch.setattr(Gate, "_opened", opened)
    monkeypatch.setattr(Gate, "_record", lambda self, verdict, opened: None)
    assert gate.rollback(dry_run=True).version == "2"
    assert gate.rollback().version == "2"
    assert moved == [("previous", "1"), ("champion", "2")]
