"""ABX against the library fastabx, where there is one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_abx import EVERYTHING, corpus, of_frames, some_codes, speakers, walks

from repcodec.abx import abx_errors
from repcodec.abx_items import abx_items
from repcodec.labels import PhoneLabels

FASTABX = """
import json, sys
import numpy, torch
from fastabx import Dataset, Score, Task
item, folder, frequency, distance, contexts = sys.argv[1:]
found = []
for speaker in "within", "across":
    data = Dataset.from_item(
        item, folder, frequency, extension=".npy", device="cpu", progress=False,
        feature_maker=lambda path: torch.from_numpy(numpy.load(path)),
    )
    by = ["prev-phone", "next-phone"] if contexts == "triphone" else []
    by, across = (by + ["speaker"], None) if speaker == "within" else (by, ["speaker"])
    score = Score(Task(data, on="#phone", by=by, across=across), distance, progress=False)
    levels = [("next-phone", "prev-phone")] if contexts == "triphone" else []
    found += [score.collapse(levels=[*levels, "speaker"]), len(score.cells), score.cells["size"].sum()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def fastabx_python():
    """A Python that has fastabx, which needs 3.12: the one that REPCODEC_FASTABX_PYTHON names, or this one."""
    python = os.environ.get("REPCODEC_FASTABX_PYTHON", sys.executable)
    done = subprocess.run([python, "-c", "import fastabx"], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"{python} has no fastabx (Python 3.12: pip install fastabx); REPCODEC_FASTABX_PYTHON names one")
    return python


@pytest.mark.parametrize("distance", ["angular", "different"])
@pytest.mark.parametrize("kind", ["triphone", "phone"])
def test_fastabx_finds_the_same(fastabx_python, tmp_path, kind, distance):
    segments, utterances, durations = corpus(11, num_speakers=4, per_speaker=5, num_segments=60)
    values = walks(11, durations, 50) if distance == "angular" else some_codes(11, durations, 50, 1)
    items = abx_items(PhoneLabels(segments), utterances, speakers(utterances), kind=kind, **EVERYTHING)
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    for token in items.tokens:
        before, after = divmod(int(token["context"]), len(items.phones))
        # fastabx refuses what has no frame, and labels behind the last one.
        end = min(token["end"], len(values[utterances[token["utterance"]]]) / 50 - 0.01)
        if int(end * 50 + 0.5 + 1e-6) > int(np.ceil(token["start"] * 50 - 0.5 - 1e-6)):
            place = f"{token['utterance']} {token['start']:.3f} {end:.3f}"
            lines.append(f"{place} p{token['phone']} p{before} p{after} {token['speaker']}")
    (tmp_path / "test.item").write_text("\n".join(lines) + "\n")
    for number, utterance in enumerate(utterances):
        np.save(tmp_path / f"{number}.npy", values[utterance].astype(np.float32))
    name = {"angular": "angular", "different": "identical"}[distance]
    done = subprocess.run(
        [fastabx_python, "-c", FASTABX, tmp_path / "test.item", tmp_path, "50", name, kind],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    within, within_cells, within_triples, across, across_cells, across_triples = json.loads(done.stdout)
    errors = abx_errors(items, of_frames(values, utterances), 50, distance)

    assert (errors.within_cells, errors.within_triples) == (within_cells, within_triples)
    assert (errors.across_cells, errors.across_triples) == (across_cells, across_triples)
    assert errors.items == len(lines) - 1
    # Its distances are float32, where ours are float64.
    assert (errors.within, errors.across) == (pytest.approx(within, abs=1e-5), pytest.approx(across, abs=1e-5))
