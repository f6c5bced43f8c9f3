"""TensorBoard with our page in front."""

from tensorboard import default

from app.tensorboard import plugins


def test_our_page_is_the_first_tab_and_none_is_lost():
    assert plugins()[0].__name__ == "CustomScalarsPlugin"
    assert sorted(map(str, plugins())) == sorted(map(str, default.get_plugins()))
