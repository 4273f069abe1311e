from pipeline.files import Folders
from pipeline.report.page import build_report
from pipeline.report.tables import print_summary


def test_label(raw, write_run, tmp_path):
    params = write_run(raw)
    build_report(params, Folders.here(tmp_path), tmp_path)
    print_summary(tmp_path)
    import shutil

    shutil.copytree(tmp_path, "/tmp/rep1", dirs_exist_ok=True)


def test_free(free_text, write_run, tmp_path):
    params = write_run(free_text)
    build_report(params, Folders.here(tmp_path), tmp_path)
    print_summary(tmp_path)
    import shutil

    shutil.copytree(tmp_path, "/tmp/rep2", dirs_exist_ok=True)
