"Give setuptools every field that pyproject.toml calls dynamic, from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
name, suffix = cfg['lib_name'], '_requirements'

dist = setup(
    description=cfg['description'], author=cfg['author'],
    project_urls={'Repository': cfg['repository']} if cfg['repository'] else {},
    license_expression=cfg['license'], keywords=cfg['keywords'].split(),
    classifiers=cfg['classifiers'].strip().splitlines(),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={key.removesuffix(suffix): value.split()
                    for key, value in cfg.items() if key.endswith(suffix)},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(),
                      nbdev=[f'{name}={name}._modidx:d']))

# Only pyproject.toml may name a package, and nbdev reads the name there.
if dist.get_name() != name:
    raise SystemExit(f'settings.ini says lib_name = {name}, but pyproject.toml says '
                     f'name = {dist.get_name()}: use one name in both')
