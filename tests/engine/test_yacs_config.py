"""Reading yacs configs: files and options that are none."""

import pytest
from detectron2.config import LazyConfig

from ccnet_d2.engine.yacs_config import load_config
from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import get_config


@pytest.mark.parametrize("name", ["toy/ccnet_synthetic.py", "coco/mask_rcnn_R_50_FPN_1x.py"])
def test_the_record_of_a_lazy_config_run_is_no_yacs_config(tmp_path, name):
    record = tmp_path / "config.yaml"
    LazyConfig.save(get_config(name), str(record))
    with pytest.raises(
        UserError, match=r"config\.yaml is the record of a LazyConfig run.*give the \.py file"
    ):
        load_config(str(record))
    record.write_text("dataloader: {}\n")
    with pytest.raises(UserError, match="cannot be used: Non-existent config key: dataloader"):
        load_config(str(record))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not hold groups of keys with values, such as 'SOLVER"),
        ("- SOLVER", "does not hold groups of keys with values"),
        ("text", "does not hold groups of keys with values"),
        ("5: 6", "does not hold groups of keys with values"),
        ("SOLVER: 5", "<class 'int'>) for config key: SOLVER."),
        ("SOLVER:", "<class 'NoneType'>) for config key: SOLVER."),
        ("SOLVER: {MAX_ITER: '3 x'}", "with values (40000 vs. 3 x) for config key: SOLVER.MAX_ITER."),
        ("SOLVER:\n\tMAX_ITER: 5", "run.yaml: found character '\\t' that cannot start any token."),
        ("_BASE_: nowhere.yaml", "nowhere.yaml does not exist."),
        ("_BASE_: .", "it, or its _BASE_, cannot be read: [Errno 21] Is a directory: '"),
        ("_BASE_: run.yaml", "its _BASE_ leads back to the file that names it"),
        ("_BASE_: other.yaml", "its _BASE_ leads back to the file that names it"),
    ],
)
def test_files_that_hold_no_config(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    (tmp_path / "other.yaml").write_text("_BASE_: [run.yaml]")
    with pytest.raises(UserError) as error:
        load_config(str(path))
    message = str(error.value)
    assert message.startswith(f"Config {path} cannot be used: ") and words in message
    assert message.endswith(".") and "\n" not in message
    if "\t" in text:
        assert f"line 2 of {path}: " in message


def test_options_come_in_pairs():
    with pytest.raises(UserError, match="KEY VALUE pairs, but there are 1"):
        load_config("yacs/toy/ccnet_synthetic.yaml", ["SOLVER.MAX_ITER=3"])
