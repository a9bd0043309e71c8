"`sgdrop data` fetches the image sets that notebooks and tests can use."
import tarfile
import zipfile

import pytest
from fastai.data.all import get_image_files

from sgdrop import data as sgdrop_data
from sgdrop.data import (
    IMAGE_SETS, action_name, domain_files, flower_name, found_set, missing_sets)
from sgdrop.experiments.main import main


def fetch(*options): return main(['data', *options])


@pytest.fixture
def archives(tmp_path, empty_machine, monkeypatch):
    "Let downloads come from small archives in this folder"
    def pack(name, *files):
        with tarfile.open(tmp_path / name, 'w:gz') as tar:
            for file in files:
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).write_bytes(b'an image')
                tar.add(tmp_path / file, file)
        return (tmp_path / name).as_uri()
    def pack_github(name, file):
        (tmp_path / name).mkdir()
        with zipfile.ZipFile(tmp_path / name / 'HEAD.zip', 'w') as archive:
            archive.writestr(f'{name}-HEAD/{file}', b'an image')
        return (tmp_path / name / 'HEAD.zip').as_uri()
    image = 'imagenette2-160/train/n01440764/a.JPEG'
    urls = dict(imagenette=pack('imagenette2-160.tgz', image),
                flowers17=pack('17flowers.tgz', 'jpg/image_0081.jpg', 'jpg/files.txt'),
                bar=pack_github('BAR', 'train/pole_vaulting_2.jpg'),
                pacs=pack_github('PACS', 'PACS/sketch/dog/a.jpg'))
    local = {name: (urls[name], *rest[1:]) for name, rest in IMAGE_SETS.items()}
    monkeypatch.setattr(sgdrop_data, 'IMAGE_SETS', local)


def test_sets_are_fetched_once_and_found(archives, empty_machine, capfd):
    assert fetch('--missing') == 0
    assert capfd.readouterr().out == 'imagenette flowers17 bar pacs\n'
    assert fetch('flowers17') == 0 and missing_sets() == ['imagenette', 'bar', 'pacs']
    assert fetch() == 0 and missing_sets() == []
    flowers = found_set('flowers17')
    assert flowers == empty_machine / '17flowers'
    assert [flower_name(f) for f in flowers.glob('*.jpg')] == ['snowdrop']
    assert (found_set('imagenette') / 'train/n01440764/a.JPEG').exists()
    [vaulter] = get_image_files(found_set('bar'))
    assert (action_name(vaulter), vaulter.parent.name) == ('pole vaulting', 'train')
    assert [len(files) for files in domain_files('sketch')] == [0, 1]


def test_a_failed_download_is_one_line_with_the_address(
        empty_machine, no_network, capsys):
    assert fetch('flowers17') == 1
    said = capsys.readouterr()
    assert said.out == '' and said.err.count('\n') == 1
    assert 'flowers17' in said.err and IMAGE_SETS['flowers17'][0] in said.err


def test_a_broken_archive_is_one_line(archives, tmp_path, capsys):
    (tmp_path / '17flowers.tgz').write_bytes(b'<html>moved</html>')
    assert fetch() == 1 and missing_sets() == ['flowers17', 'bar', 'pacs']
    assert capsys.readouterr().err.count('\n') == 1
