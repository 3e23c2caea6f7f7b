"""Launch configurations: what the tables hold, which entry a shape gets, and what is said where none fits."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hawk_kernels.backends.kernels import configs
from hawk_kernels.backends.kernels.configs import HiddenConfig, ScoreConfig, Shape

ARCHITECTURES = ["gfx942", "sm_100", "sm_80", "sm_90"]
SCORE = {
    "block_keys": 16,
    "programs_per_multiprocessor": 3,
    "query_elements": 4096,
    "sum_block": 128,
    "num_warps": 2,
    "max_registers": 128,
}


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process(monkeypatch):
    looked_up = (configs._own_table, configs.score_config, configs.hidden_config)

    def forget():
        configs._warned.clear()
        for cached in looked_up:
            cached.cache_clear()

    monkeypatch.delenv(configs.TABLE_VARIABLE, raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Makes a user's table of one score_and_select entry and names it in the environment."""

    def make(shape, architecture="sm_90", config=SCORE):
        content = {"architecture": architecture, "source": "a test", "multiprocessors": 10, "score_hidden": []}
        content["score_and_select"] = [{"shape": shape._asdict(), "config": config}]
        path = tmp_path / "own.json"
        path.write_text(json.dumps(content))
        monkeypatch.setenv(configs.TABLE_VARIABLE, str(path))
        return path

    return make


def looked_up(architecture, *shapes, kernel="score_and_select"):
    return [configs.config_for(architecture, kernel, shape) for shape in shapes]


def test_four_architectures_are_committed():
    assert configs.committed_architectures() == ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_committed_table_says_where_it_comes_from(architecture):
    table = configs.committed_table(architecture)
    assert table.architecture == architecture
    measured = "measured by python -m hawk_kernels.tune"
    not_measured = "not measured: chosen by compile-only registers and a byte model"
    assert table.source.startswith((measured, not_measured))
    for kernel, made in configs.CONFIGS.items():
        for entry in table.entries[kernel]:
            config = configs.resolve(kernel, entry, table.multiprocessors)
            assert isinstance(config, made)
            powers = [
                value
                for name, value in config._asdict().items()
                if name not in ("num_programs", "text_parts", "max_registers")
            ]
            assert all(value & (value - 1) == 0 for value in powers), config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_committed_tables_cover_what_is_promised(architecture):
    """M from 1 to 262144, B from 1 to 64, all head sizes and dtypes: nobody is warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in ("half", "fp32"):
            for tokens in (1, 70, 256, 1296, 2048, 2049, 5120, 16384, 70000, 262144):
                for batch in (1, 8, 64):
                    configs.config_for(architecture, "score_hidden", Shape(dtype, 0, batch, tokens))
                    for head_dim in (16, 64, 72, 80, 96, 128, 256):
                        configs.config_for(architecture, "score_and_select", Shape(dtype, head_dim, 8 * batch, tokens))


def table_of(*shapes):
    entries = tuple(
        configs.Entry(Shape(*shape), {**SCORE, "block_keys": 16 + index}) for index, shape in enumerate(shapes)
    )
    return configs.Table("sm_90", "a test", 10, {"score_and_select": entries, "score_hidden": ()})


TABLE = table_of(
    ("half", 128, 4, 1024),
    ("half", 128, 4, 16384),
    ("half", 128, 64, 1024),
    ("half", 256, 4, 1024),
    ("fp32", 128, 0, 0),
)


@given(st.sampled_from(TABLE.entries["score_and_select"][:4]))
def test_a_shape_that_an_entry_was_made_for_gets_it(entry):
    assert configs.find_entry(TABLE, "score_and_select", entry.shape) == (entry, True)


@given(st.sampled_from(["half", "fp32"]), st.integers(1, 300), st.integers(1, 1000), st.integers(1, 10**6))
def test_the_nearest_entry_is_never_for_another_dtype_or_smaller_heads(dtype, head_dim, rows, tokens):
    entry, covered = configs.find_entry(TABLE, "score_and_select", Shape(dtype, head_dim, rows, tokens))
    assert entry.shape.dtype == dtype
    largest = 256 if dtype == "half" else 128
    assert entry.shape.head_dim == largest if head_dim > largest else entry.shape.head_dim >= head_dim
    assert not (covered and head_dim > largest)


@pytest.mark.parametrize(
    ("rows", "tokens", "made_for", "covered"),
    [
        (4, 4095, (4, 1024), True),
        (4, 4097, (4, 16384), True),
        (4, 65536, (4, 16384), True),
        (4, 65537, (4, 16384), False),
        (16, 1024, (4, 1024), True),
        (17, 1024, (64, 1024), True),
        (257, 1024, (64, 1024), False),
        # shorter ones take what a launch takes
        (4, 1, (4, 1024), True),
    ],
)
def test_distance_is_a_ratio_and_an_entry_reaches_four_times_as_far(rows, tokens, made_for, covered):
    entry, is_covered = configs.find_entry(TABLE, "score_and_select", Shape("half", 128, rows, tokens))
    assert ((entry.shape.rows, entry.shape.tokens), is_covered) == (made_for, covered)


def test_an_entry_without_a_length_is_for_every_length():
    for shape in (Shape("fp32", 64, 1, 1), Shape("fp32", 128, 10**4, 10**7)):
        entry, covered = configs.find_entry(TABLE, "score_and_select", shape)
        assert entry.shape.dtype == "fp32"
        assert covered


def test_a_shape_that_no_table_covers_gets_the_nearest_entry_and_one_warning(monkeypatch):
    monkeypatch.setattr(configs, "committed_table", lambda architecture: TABLE)
    far = [Shape("half", 128, 4, tokens) for tokens in (10**6, 10**7)]
    with pytest.warns(
        RuntimeWarning, match="no launch configuration of score_and_select .*hawk_kernels.tune"
    ) as caught:
        found = looked_up("sm_90", *far)
    assert [config.block_keys for config in found] == [17, 17]
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        ("sm_75", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_100"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx1100", "gfx942"),
    ],
)
def test_an_architecture_without_a_table_takes_that_of_the_one_before(architecture, nearest):
    assert configs.nearest_architecture(architecture) == nearest


def test_an_architecture_without_a_table_is_said_once():
    shapes = [Shape("half", 128, 4, tokens) for tokens in (1296, 131072)]
    with pytest.warns(RuntimeWarning, match="sm_120 GPUs, using those for sm_100.*hawk_kernels.tune") as caught:
        found = looked_up("sm_120", *shapes)
    assert found == looked_up("sm_100", *shapes)
    assert len(caught) == 1


def test_programs_follow_the_multiprocessors():
    shape = Shape("half", 128, 4, 131072)
    whole, part = (configs.config_for("sm_90", "score_and_select", shape, count) for count in (132, 66))
    assert whole.num_programs == 2 * part.num_programs
    assert whole._replace(num_programs=0) == part._replace(num_programs=0)


class TestOwnTable:
    def test_is_used_where_it_is_named(self, own_table):
        own_table(Shape("half", 128, 4, 1296))
        config = configs.config_for("sm_90", "score_and_select", Shape("half", 128, 4, 1300), 100)
        assert config == ScoreConfig(16, 300, 4096, 128, 2, 128)

    def test_leaves_other_shapes_and_kernels_to_the_committed_one(self, own_table, recwarn):
        committed = [
            configs.config_for("sm_90", "score_and_select", Shape("half", 128, 4, 131072)),
            configs.config_for("sm_90", "score_hidden", Shape("half", 0, 1, 1296)),
        ]
        own_table(Shape("half", 128, 4, 1296))
        configs._own_table.cache_clear()
        assert committed[0] == configs.config_for("sm_90", "score_and_select", Shape("half", 128, 4, 131072))
        assert committed[1] == configs.config_for("sm_90", "score_hidden", Shape("half", 0, 1, 1296))
        assert not recwarn

    def test_of_another_architecture_is_left_aside_with_one_warning(self, own_table):
        own_table(Shape("half", 128, 4, 1296), architecture="sm_80")
        with pytest.warns(RuntimeWarning, match="names a table for sm_80, this GPU is sm_90") as caught:
            found = looked_up("sm_90", *(Shape("half", 128, 4, tokens) for tokens in (1296, 5120)))
        assert [config.query_elements for config in found] == [8192, 8192]
        assert len(caught) == 1

    def test_on_an_architecture_that_has_none_there_is_nothing_to_warn_of(self, own_table, recwarn):
        own_table(Shape("half", 128, 4, 1296), architecture="sm_120")
        assert configs.config_for("sm_120", "score_and_select", Shape("half", 128, 4, 1296)).block_keys == 16
        assert not recwarn

    def test_elsewhere_than_named_it_is_not_found(self, own_table, monkeypatch):
        own_table(Shape("half", 128, 4, 1296))
        monkeypatch.delenv(configs.TABLE_VARIABLE)
        assert configs.config_for("sm_90", "score_and_select", Shape("half", 128, 4, 1296)).query_elements == 8192

    def test_that_is_missing_is_an_error(self, monkeypatch, tmp_path):
        monkeypatch.setenv(configs.TABLE_VARIABLE, str(tmp_path / "nothing.json"))
        with pytest.raises(ValueError, match=r"nothing.json: expected a table of launch configurations.*or unset"):
            configs.config_for("sm_90", "score_and_select", Shape("half", 128, 4, 1296))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_warps": 0}, "num_warps: expected an int >= 1, got 0"),
            ({"num_warps": "4"}, "num_warps: expected an int >= 1, got '4'"),
            ({"max_registers": -1}, "max_registers: expected an int >= 0, got -1"),
            ({"num_stages": 3}, "expected the fields .*num_stages"),
        ],
    )
    def test_with_a_bad_entry_is_an_error(self, own_table, change, message):
        own_table(Shape("half", 128, 4, 1296), config={**SCORE, **change})
        with pytest.raises(ValueError, match=message):
            configs.config_for("sm_90", "score_and_select", Shape("half", 128, 4, 1296))


class TestDevice:
    @pytest.fixture
    def gpu(self, monkeypatch):
        properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, gcnArchName="gfx942:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return torch.device("cuda", 0)

    def test_architecture(self, gpu, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", None)
        assert configs.architecture_of(gpu) == "sm_90"
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert configs.architecture_of(gpu) == "gfx942"

    def test_a_repeated_shape_is_one_cached_lookup(self, gpu, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", None)
        shape = (gpu, torch.bfloat16, 1, 28, 4, 1296, 128)
        expected = configs.config_for("sm_90", "score_and_select", Shape("half", 128, 4, 1296), 132)
        assert [configs.score_config(*shape) for _ in range(3)] == [expected] * 3
        assert configs.score_config.cache_info().hits == 2
        assert configs.hidden_config(gpu, torch.float32, 1, 1296, 3584).block_channels == 64
        assert configs.hidden_config(gpu, torch.float16, 1, 1296, 3584).block_channels == 128


def test_the_interpreter_has_large_tiles_where_rows_are_long():
    cpu = torch.device("cpu")
    short, long = (configs.score_config(cpu, torch.float32, 1, 4, 2, count, 64) for count in (100, 20000))
    assert short.block_keys < long.block_keys
    assert isinstance(configs.hidden_config(cpu, torch.float32, 1, 100, 64), HiddenConfig)
