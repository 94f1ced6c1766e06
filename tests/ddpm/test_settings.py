"""Settings, lists of choices, and the one form of `Sampling`."""

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Literal

import pytest

import ddpm
from ddpm.choices import Choices
from ddpm.generate import _FIRST, _NEUTRAL, OF_ALL_KINDS, Sampling
from ddpm.guidance import GUIDANCE, Autoguided, ClassifierFree
from ddpm.models import NETWORKS
from ddpm.prediction import Clipping
from ddpm.samplers import DDIM, SAMPLERS, Heun
from ddpm.samplers.spacing import SPACINGS
from ddpm.schedule import SCHEDULES
from ddpm.settings import Settings, setting, settings_of
from ddpm.timesteps import TIMESTEPS
from ddpm.weights import WEIGHTS


@dataclass(frozen=True)
class Example(Settings):
    count: int = setting(3, "how many", ge=1, le=9)
    share: float | None = setting(None, "of the whole", gt=0)
    pair: tuple[float, float] = setting((0.0, 1.0), "low and high", ge=0)
    word: Literal["a", "b"] = setting("a", "which")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, r"count must be in \[1, 9\], got 0"),
        ({"count": 10}, r"count must be in \[1, 9\], got 10"),
        ({"share": 0.0}, "share must be > 0, got 0.0"),
        ({"pair": (0.5, -1.0)}, "pair must be >= 0"),
        ({"word": "c"}, "unknown word 'c'; allowed: a, b"),
        ({"count": 2.5}, "count must be a whole number, got 2.5"),
        ({"count": True}, "count must be a whole number, got True"),
        ({"share": "half"}, "share must be a number or None, got 'half'"),
        ({"pair": (0.5,)}, r"pair must be 2 numbers in a list, got \(0.5,\)"),
        ({"pair": 0.5}, "pair must be 2 numbers in a list, got 0.5"),
        ({"pair": (0.5, "x")}, "pair must be 2 numbers in a list"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        Example(**values)
    with pytest.raises(ValueError, match=message):
        Example().replaced(**values)


@pytest.mark.parametrize(
    "registry", [SAMPLERS, SCHEDULES, GUIDANCE, WEIGHTS, TIMESTEPS, NETWORKS], ids=lambda r: r.kind
)
def test_every_choice_has_defaults_that_are_allowed_and_a_meaning_for_every_setting(registry):
    for name, cls in registry.items():
        assert cls() == cls()
        assert hash(cls()) == hash(cls())
        assert all(len(s.meaning) > 5 for s in settings_of(cls)), name
        assert registry.name_of(cls()) == name


def test_an_unknown_choice_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"unknown sampler 'hoin'; allowed: ddim, .*Did you mean 'heun'\?"):
        SAMPLERS.find("hoin")
    with pytest.raises(KeyError, match="unknown spacing"):
        SPACINGS["none"]
    with pytest.raises(ValueError, match="is no sampler of the list"):
        SAMPLERS.name_of(Example())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_sampling_survives_json_for_every_pair_of_kinds(sampler, guidance):
    made = Sampling(SAMPLERS[sampler](steps=7), GUIDANCE[guidance](scale=2.0, interval=(0.1, 0.9)), Clipping(clip=0.5))  # type: ignore[call-arg]
    plain = json.loads(json.dumps(made.to_json()))
    assert Sampling.from_json(plain) == made
    assert (plain["kind"], plain["guidance"], plain["steps"], plain["scale"]) == (sampler, guidance, 7, 2.0)
    fields = {
        s.name
        for part in (made.sampler, made.guidance, made.clipping, made.arithmetic)
        for s in settings_of(type(part))
    }
    assert plain.keys() == fields | {"kind", "guidance"}  # complete, whatever the defaults become


def test_fields_that_came_later_are_neutral_in_older_files_and_absent_from_keys():
    """A field added to a choice of the first release has to be entered in `_NEUTRAL`."""
    first = ("ddim", "ancestral", "dpm_solver", "heun", "predictor_corrector")
    kinds = [SAMPLERS[name] for name in first] + [GUIDANCE[n] for n in ("classifier_free", "classifier", "auto")]
    for cls in (*kinds, *OF_ALL_KINDS):
        for field in settings_of(cls):
            assert field.name in _FIRST or field.default == _NEUTRAL[field.name]
    assert Sampling().key() == json.loads(json.dumps(_FIRST))
    assert Sampling(DDIM(spacing="karras")).key() == {**_FIRST, "spacing": "karras"}
    older = {**_FIRST, "kind": "heun", "steps": 9}
    assert Sampling.from_json(older) == Sampling(Heun(steps=9))


def test_flat_fields_change_what_they_are_fields_of():
    sampling = Sampling(DDIM(steps=20, eta=0.5), ClassifierFree(2.0, rescale=0.3))
    assert sampling.with_fields(scale=3.0, steps=4, clip=None) == Sampling(
        DDIM(steps=4, eta=0.5), ClassifierFree(3.0, rescale=0.3), Clipping(clip=None)
    )
    other = sampling.with_fields(kind="heun", guidance="auto", weak="M")
    assert other == Sampling(Heun(steps=20), Autoguided(2.0, weak="M"))
    with pytest.raises(ValueError, match="eta: no setting of the sampler 'heun'"):
        sampling.with_fields(kind="heun", eta=0.1)
    with pytest.raises(ValueError, match="unknown sampler"):
        Sampling.of(kind="dim")


def test_no_two_parts_of_a_sampling_have_a_field_of_the_same_name():
    shared = {s.name for cls in OF_ALL_KINDS for s in settings_of(cls)}
    samplers = {s.name for cls in SAMPLERS.values() for s in settings_of(cls)}
    guidance = {s.name for cls in GUIDANCE.values() for s in settings_of(cls)}
    assert not shared & samplers | shared & guidance | samplers & guidance
    assert not {"kind", "guidance"} & (shared | samplers | guidance)


PLUGIN = '''
from dataclasses import dataclass
from ddpm.samplers import DDIM
from ddpm.settings import setting

@dataclass(frozen=True)
class Halved(DDIM):
    """DDIM whose images come out at half the contrast."""

    contrast: float = setting(0.5, "factor on the image", gt=0)

    def __call__(self, *args, **kwargs):
        for sample in super().__call__(*args, **kwargs):
            yield type(sample)(sample.x_t * (self.contrast if sample.t == 0 else 1), sample.x0, sample.t)
'''
PROGRAM = """
import json, torch
from ddpm.generate import Sampling
from ddpm.samplers import SAMPLERS
from pipelines.config import compose, sampling
config = compose(["sampler.kind=halved", "sampler.contrast=0.25", "sampler.steps=3"])
print(json.dumps({"names": list(SAMPLERS), "json": sampling(config).to_json(),
                  "back": Sampling.from_json(sampling(config).to_json()) == sampling(config)}))
"""


def test_another_package_adds_a_sampler_by_an_entry_point_and_it_is_configured_like_ours(tmp_path):
    """A package as pip installs it: a module, and metadata with the entry point."""
    (tmp_path / "halved_sampler.py").write_text(PLUGIN)
    metadata = tmp_path / "halved_sampler-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: halved-sampler\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[ddpm.samplers]\nhalved = halved_sampler:Halved\n")
    root = Path(ddpm.__path__[0]).parent
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "halved" in found["names"]
    assert found["back"]
    assert (found["json"]["kind"], found["json"]["contrast"], found["json"]["steps"]) == ("halved", 0.25, 3)


def test_an_entry_point_cannot_take_the_name_of_a_built_in_choice(monkeypatch):
    taken = EntryPoints([EntryPoint(name="ddim", value="elsewhere:Sampler", group="ddpm.samplers")])
    monkeypatch.setattr("ddpm.choices._entry_points", lambda: taken)
    with pytest.raises(ValueError, match=r"'ddim' in ddpm\.samplers is named"):
        list(Choices("sampler", "ddpm.samplers", {"ddim": DDIM}))
