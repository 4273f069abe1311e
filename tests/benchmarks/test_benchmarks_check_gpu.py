"""`make check-gpu` where there is no GPU."""

import pytest

from benchmarks import check_gpu


def test_without_a_gpu_it_says_so_and_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        check_gpu.main()
    assert ended.value.code == 2
    assert "torch sees no GPU" in capsys.readouterr().err
