import csv

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from repcodec.logs import open_logs


def table(folder):
    with open(folder / "logs" / "version_0" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def write(folder, steps, step=None, **more):
    logger = CSVLogger(folder, "logs")
    open_logs([logger], folder, step)
    for number in steps:
        logger.log_metrics({"loss": number / 7, **more}, number)
    logger.save()


def test_a_table_goes_on_without_what_was_logged_after_the_checkpoint(tmp_path):
    write(tmp_path, range(6))
    write(tmp_path, range(4, 8), step=4, error=2.5)
    assert [(row["step"], row["loss"]) for row in table(tmp_path)] == [(str(n), str(n / 7)) for n in range(8)]
    assert [row["error"] for row in table(tmp_path)] == [""] * 4 + ["2.5"] * 4
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["version_0"]


def test_a_table_whose_last_row_was_cut_off_goes_on(tmp_path):
    write(tmp_path, range(4))
    path = tmp_path / "logs" / "version_0" / "metrics.csv"
    path.write_text(path.read_text()[:-4])
    write(tmp_path, range(3, 5), step=3)
    assert [row["step"] for row in table(tmp_path)] == list("01234")


@pytest.mark.parametrize("half", ["", "loss,step\r\n"])
def test_a_kill_while_a_table_is_opened_loses_no_row(tmp_path, half):
    write(tmp_path, range(4))
    path = tmp_path / "logs" / "version_0" / "metrics.csv"
    path.rename(path.with_name("metrics.before.csv"))
    if half:
        path.write_text(half)
    write(tmp_path, range(3, 5), step=3)
    assert [row["step"] for row in table(tmp_path)] == list("01234")
    assert not path.with_name("metrics.before.csv").exists()


def test_a_run_that_begins_has_a_table_of_its_own(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, range(2))
    assert len(table(tmp_path)) == 3
    assert (tmp_path / "logs" / "version_1" / "metrics.csv").exists()


def test_a_folder_without_a_table_goes_on_with_a_new_one(tmp_path):
    write(tmp_path, range(5, 7), step=5)
    assert [row["step"] for row in table(tmp_path)] == ["5", "6"]


def test_tensorboard_goes_on_in_the_same_folder_and_forgets_later_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, step in ((0, None), (4, 4)):
        logger = TensorBoardLogger(tmp_path, "tensorboard")
        open_logs([logger], tmp_path, step)
        for number in range(begin, begin + 6):
            logger.log_metrics({"loss": float(number + begin)}, number)
        logger.finalize("success")
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(0, 0), (1, 1), (2, 2), (3, 3), *((n, n + 4) for n in range(4, 10))]


def test_wandb_goes_on_under_the_same_id_and_a_new_run_has_another(tmp_path):
    ids = []
    for step in (None, 5, None):
        logger = WandbLogger(save_dir=tmp_path, offline=True)
        open_logs([logger], tmp_path, step)
        ids.append(logger._wandb_init["id"])
    assert ids[0] == ids[1] != ids[2]
    assert logger._wandb_init["resume"] == "allow"
    assert (tmp_path / "wandb_id.txt").read_text() == ids[2]
