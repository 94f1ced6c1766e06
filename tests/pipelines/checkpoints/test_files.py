import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ddpm.models.unet import UNet
from pipelines.checkpoints import (
    ModelError,
    check_resumable,
    load_checkpoint,
    save_checkpoint,
    with_file,
)
from pipelines.checkpoints.references import resolve
from pipelines.config import compose
from pipelines.storage import Storage
from tests.pipelines.checkpoints.tiny import CONFIG, DATASET, SMALL, a_checkpoint


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "c", a_checkpoint(128))
    return tmp_path / "c"


def test_a_checkpoint_brings_back_every_bit(tmp_path):
    checkpoint = a_checkpoint(128, power=True)
    state = save_checkpoint(tmp_path / "c", checkpoint)
    loaded, tensors = load_checkpoint(tmp_path / "c")
    assert loaded == replace(state, identity=json.loads(json.dumps(state.identity)))
    assert (loaded.images_seen, loaded.optimizer_steps, loaded.skipped) == (128, 1, 2)
    assert tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(tensors[k], v) for k, v in checkpoint.tensors.items())


def test_a_checkpoint_is_a_model_folder(folder):
    model = resolve(str(folder), tracking_uri=None, storage=Storage()).model
    assert model.spec.classes == DATASET.classes
    assert model.spec.sampling.guidance.scale == CONFIG.guidance.scale


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "model.json"])
def test_a_flipped_bit_or_a_missing_file_is_found(folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"{name} is missing or damaged"):
        load_checkpoint(folder)
    path.unlink()
    with pytest.raises(ModelError, match=f"{name} is missing or damaged"):
        load_checkpoint(folder)


def test_a_folder_without_its_last_file_is_incomplete(folder):
    (folder / "state.json").unlink()
    with pytest.raises(ModelError, match="not a complete checkpoint"):
        load_checkpoint(folder)


def test_a_state_of_another_release_or_without_sense_is_refused(folder):
    path = folder / "state.json"
    plain = json.loads(path.read_text())
    for damaged in ("[]", "", "{}", json.dumps({**plain, "checkpoint_version": 99}), json.dumps({**plain, "x": 1})):
        path.write_text(damaged)
        with pytest.raises(ModelError, match=r"damaged|checkpoint version"):
            load_checkpoint(folder)


def test_other_settings_or_data_are_refused_by_name(folder):
    state = load_checkpoint(folder)[0]
    check_resumable(state, CONFIG, DATASET)
    check_resumable(state, compose(["+experiment=digits", "cluster.num_workers=1"]), DATASET)
    with pytest.raises(ModelError, match=r"optim\.lr: 0\.002 before, 0\.5 now"):
        check_resumable(state, compose(["+experiment=digits", "optim.lr=0.5"]), DATASET)
    with pytest.raises(ModelError, match="dataset digest"):
        check_resumable(state, CONFIG, replace(DATASET, digest="other"))


def test_a_setting_that_only_one_of_run_and_configuration_has_is_refused_by_name(folder):
    state = load_checkpoint(folder)[0]
    without = {name: value for name, value in state.identity.items() if name != "optim.lr"}
    with pytest.raises(ModelError, match=r"optim\.lr: None before, 0\.002 now"):
        check_resumable(replace(state, identity=without), CONFIG, DATASET)
    with pytest.raises(ModelError, match=r"optim\.gone: 1 before, None now"):
        check_resumable(replace(state, identity={**state.identity, "optim.gone": 1}), CONFIG, DATASET)


def test_a_run_from_before_a_default_changed_is_told_how_it_goes_on(folder):
    by_default, eps = (compose(["+experiment=digits", f"objective.prediction={kind}"]) for kind in ("v", "eps"))
    since = load_checkpoint(folder)[0]
    before = replace(since, identity={**since.identity, "objective.prediction": "eps", "images": 102_400})
    told = r"objective\.prediction: eps before, v now \(the default has.*add images=102400 objective\.prediction=eps; "
    with pytest.raises(ModelError, match=f"(?s){told}"):
        check_resumable(before, by_default, DATASET)
    check_resumable(before, compose(["+experiment=digits", "images=102400", "objective.prediction=eps"]), DATASET)
    with pytest.raises(ModelError, match=r"objective\.prediction: v before, eps now\n"):
        check_resumable(since, eps, DATASET)


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "a/b", "..", "state.json", "a\\b"])
def test_a_state_that_names_files_outside_its_folder_is_refused(folder, name):
    path = folder / "state.json"
    plain = json.loads(path.read_text())
    for field in ("files", "sizes"):
        path.write_text(json.dumps({**plain, field: {**plain[field], name: plain[field]["model.json"]}}))
        with pytest.raises(ModelError, match="which is no file of a checkpoint"):
            load_checkpoint(folder)


def test_a_file_that_is_added_later_is_checked_like_the_others(folder):
    state = load_checkpoint(folder)[0]
    (folder / "unsent.zip").write_bytes(b"points")
    (folder / "state.json").write_text(with_file(state, "unsent.zip", b"points").to_json())
    assert load_checkpoint(folder)[0].sizes["unsent.zip"] == 6
    (folder / "unsent.zip").write_bytes(b"paints")
    with pytest.raises(ModelError, match=r"unsent\.zip is missing or damaged"):
        load_checkpoint(folder)


READ = """
import sys
from pathlib import Path
from ddpm.model import stored_weights
from ddpm.tensor_files import tensors_digest
from pipelines.checkpoints import load_checkpoint

def private():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

before, most, kept = private(), 0, [stored_weights(Path(sys.argv[1]))[1], load_checkpoint(Path(sys.argv[1]))[1]]
for tensors in kept:
    tensors_digest(tensors)
    for tensor in tensors.values():
        tensor.contiguous().sum()
        most = max(most, private() - before)
print(most)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process")
def test_weights_and_checkpoints_are_read_without_holding_them_in_memory(tmp_path):
    large = replace(SMALL, channels=(512,))
    network = UNet(large).state_dict()
    tensors = {f"{kind}{name}": tensor for kind in ("network.", "ema.") for name, tensor in network.items()}
    checkpoint = a_checkpoint(100)
    save_checkpoint(tmp_path, replace(checkpoint, spec=replace(checkpoint.spec, network=large), tensors=tensors))
    size = sum(tensor.nbytes for tensor in tensors.values())
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], check=True, capture_output=True, text=True)
    assert size > 100 * 2**20
    assert int(done.stdout) < size / 4
