"""The description of events in words."""

import pytest

from foley.data.events import Event, describe_events


@pytest.mark.parametrize(
    ("events", "description"),
    [
        ([(0.5, 1.2, "Dog barks")], "dog barks 0.5-1.2 s"),
        ([(2, 4, "Speech"), (0.5, 1.2, "Bark")], "bark 0.5-1.2 s; then speech 2.0-4.0 s"),
        ([(0, 3, "Rain"), (1, 2, "Bell")], "rain 0.0-3.0 s; meanwhile bell 1.0-2.0 s"),
        ([(0, 9.5, "Rain"), (1, 2, "Bell")], "rain throughout; meanwhile bell 1.0-2.0 s"),
        ([(0, 1, "Bark"), (1.2, 2, "Bark")], "bark 0.0-2.0 s"),
        ([(0, 1, "Bark"), (2, 3, "Bark"), (5, 6, "Bark")], "bark 3 times 0.0-6.0 s"),
        ([(0, 1, "A"), (2, 3, "B"), (4, 5, "A")], "a 0.0-1.0 s; then b 2.0-3.0 s; then a 4.0-5.0 s"),
        # "then" is after all that came before, not after the last to begin.
        ([(0, 6, "A"), (1, 2, "B"), (3, 4, "C")], "a 0.0-6.0 s; meanwhile b 1.0-2.0 s; meanwhile c 3.0-4.0 s"),
    ],
)
def test_descriptions(events, description):
    assert describe_events([Event(*event) for event in events], 10.0) == description


def test_what_cannot_be_described():
    with pytest.raises(ValueError, match="without events"):
        describe_events([], 10.0)
    with pytest.raises(ValueError, match="'Bark' ends at 1 s, before its start"):
        describe_events([Event(2.0, 1.0, "Bark")], 10.0)
