"""Configs are found by name and by path, and wrong names are answered with near ones."""

import errno
from pathlib import Path

import pytest

from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import config_names, config_path, configs_dir, get_config


def test_names_are_runs():
    names = config_names()
    assert "camvid/ccnet_R_18_D8_half.py" in names
    assert not [name for name in names if name.startswith("common/")]


def test_by_name_with_and_without_suffix_and_by_path():
    path = config_path("toy/ccnet_synthetic.py")
    assert config_path("toy/ccnet_synthetic") == path == config_path(str(path))


def test_a_file_here_goes_before_the_project_s_own(tmp_path, monkeypatch):
    own = config_path("toy/ccnet_synthetic.py").resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/ccnet_synthetic.py").touch()
    assert config_path("toy/ccnet_synthetic.py").resolve() == tmp_path / "toy/ccnet_synthetic.py"
    assert config_path("toy/ccnet_synthetic").resolve() == own


def test_get_config_gives_a_run():
    cfg = get_config("toy/ccnet_synthetic.py")
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= set(cfg)


@pytest.mark.parametrize("form", [str, lambda path: f"./configs/../{path.relative_to(path.parents[2])}"])
def test_a_path_to_a_run_of_the_project_has_its_published_weights(monkeypatch, form):
    name = "voc12/ccnet_R_50_D8_512x512_20k"
    path = config_path(name).resolve()
    monkeypatch.chdir(path.parents[2])
    assert get_config(form(path), trained=True).train.init_checkpoint == f"ccnet://{name}"


def test_a_path_to_another_s_run_of_that_name_has_none(tmp_path):
    name = "voc12/ccnet_R_50_D8_512x512_20k"
    copy = tmp_path / f"{name}.py"
    copy.parent.mkdir()
    copy.write_text(
        f"from ccnet_d2.model_zoo import get_config\n\n_run = get_config({name!r})\n"
        "model, dataloader, train = _run.model, _run.dataloader, _run.train\n"
    )
    with pytest.raises(UserError, match=rf"no published weights for '{copy}', a run that has to be trained"):
        get_config(str(copy), trained=True)


def test_unknown_name():
    with pytest.raises(UserError, match=r"no config 'toy/ccnet_sintetic'.*toy/ccnet_synthetic\.py"):
        get_config("toy/ccnet_sintetic")


@pytest.mark.parametrize("name", ["lip/ce2p", "configs/lip/ce2p"])
def test_a_name_s_beginning_names_those_that_begin_so(name):
    with pytest.raises(
        UserError,
        match=r"did you mean lip/ce2p_R_101_\S+ or lip/ce2p_ccl_R_101_\S+ or lip/ce2p_ccl_[^ ?]+\?$",
    ):
        get_config(name)
    with pytest.raises(UserError, match=r"did you mean [^ ]+ or [^ ]+ or [^ ]+\?$"):
        get_config("cityscapes/")  # of many, three


@pytest.mark.parametrize("name", ["", "configs/", "nothing like any of them"])
def test_names_that_are_near_none_are_told_where_all_are_listed(name):
    """The first that there are would be no answer."""
    with pytest.raises(
        UserError, match=rf"no config '{name}': ccnet_d2\.model_zoo\.config_names\(\) lists all\.$"
    ):
        get_config(name)


def test_a_config_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    name = "n" * 300  # which no file system takes, as a folder without rights does not let one look into it
    with pytest.raises(UserError, match=rf"^Config {name} cannot be read: File name too long\.$"):
        get_config(name)
    (tmp_path / "run.py").touch()

    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"^Config \S+/run\.py cannot be read: Permission denied\.$"):
        get_config(str(tmp_path / "run.py"))


def test_a_config_of_another_encoding_is_one_sentence(tmp_path):
    """It is named: the error of Python's own tells a byte and its place, and no file."""
    (tmp_path / "run.py").write_bytes("# caf\xe9\nmodel = 1\n".encode("latin-1"))
    with pytest.raises(
        UserError, match=r"^Config \S+/run\.py, or one that it imports, is not text in UTF-8: invalid"
    ):
        get_config(str(tmp_path / "run.py"))


def test_a_yacs_config_is_told_where_it_works():
    with pytest.raises(UserError, match=r"not a LazyConfig.*train_net\.py.*DefaultPredictor"):
        get_config("yacs/toy/ccnet_synthetic.yaml")


def test_a_part_is_not_a_run(tmp_path):
    with pytest.raises(
        UserError, match=r"optim\.py is not a run: it defines no model and no dataloader and no train\.$"
    ):
        get_config("common/optim.py")
    (tmp_path / "half.py").write_text("model, train = {}, {}")
    with pytest.raises(UserError, match=r"half\.py is not a run: it defines no dataloader\.$"):
        get_config(str(tmp_path / "half.py"))


def test_an_installation_without_configs(monkeypatch, tmp_path):
    monkeypatch.setattr(configs_dir, "_PACKAGED", tmp_path / "packaged")
    checkout = configs_dir.config_root()
    (tmp_path / "packaged/common").mkdir(parents=True)
    assert configs_dir.config_root() == tmp_path / "packaged" != checkout
    (tmp_path / "packaged/common").rmdir()
    monkeypatch.setattr(configs_dir, "_CHECKOUT", tmp_path)
    with pytest.raises(UserError, match=r"^No configs at \S+/packaged or .*: .* reinstall ccnet_d2\.$"):
        config_names()
