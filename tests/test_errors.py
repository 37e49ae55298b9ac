"""Users' mistakes are OpenVLAErrors and one line of the command; whatever else is raised is a bug with a traceback."""

import importlib

import openvla
import pytest
import torch
from openvla import errors_openvla
from openvla.__main__ import COMMANDS, main

KINDS = [value for name, value in vars(errors_openvla).items() if isinstance(value, type) and name != "OpenVLAError"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_also_the_built_in_of_its_kind(kind):
    built_in = kind.__bases__[-1]
    assert issubclass(kind, openvla.OpenVLAError)
    assert kind.__name__ == f"OpenVLA{built_in.__name__}"
    assert str(kind("no such key: 'a'")) == "no such key: 'a'"


@pytest.mark.parametrize("kind", [*KINDS, OSError], ids=lambda kind: kind.__name__)
def test_a_users_mistake_is_one_line_and_exit_status_2(kind, monkeypatch, capsys):
    module = importlib.import_module(f"openvla.{COMMANDS['verify'][0]}")
    monkeypatch.setattr(module, "verify", lambda folder: (_ for _ in ()).throw(kind("give a folder")))
    assert main(["verify", "folder"]) == 2
    assert capsys.readouterr().err == f"openvla verify: {kind.__name__}: give a folder\n"
    with pytest.raises(kind):
        main(["verify", "folder", "--traceback"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_users_mistake_in_a_loader_worker_is_one_line(kind, monkeypatch, capsys):
    class Failing(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise kind("item 0: give another")

    module = importlib.import_module(f"openvla.{COMMANDS['verify'][0]}")
    loader = torch.utils.data.DataLoader(Failing(), num_workers=1)
    monkeypatch.setattr(module, "verify", lambda folder: list(loader))
    assert main(["verify", "folder"]) == 2
    assert capsys.readouterr().err == f"openvla verify: {kind.__name__}: item 0: give another\n"


@pytest.mark.parametrize("kind", [TypeError, ValueError, KeyError, AttributeError, RuntimeError])
def test_a_bug_keeps_its_traceback(kind, monkeypatch):
    module = importlib.import_module(f"openvla.{COMMANDS['verify'][0]}")
    monkeypatch.setattr(module, "verify", lambda folder: (_ for _ in ()).throw(kind("a bug")))
    with pytest.raises(kind):
        main(["verify", "folder"])
