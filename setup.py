"Give setuptools what settings.ini says: every field that pyproject.toml calls dynamic, but the version."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
name,suffix = cfg['lib_name'],'_requirements'

dist = setup(
    description=cfg['description'], author=cfg['author'], license_expression=cfg['license'],
    python_requires=f">={cfg['min_python']}", keywords=cfg['keywords'].split(), classifiers=cfg['classifiers'].strip().splitlines(),
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix(suffix): v.split() for k,v in cfg.items() if k.endswith(suffix)},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f'{name}={name}._modidx:d']))

# Only pyproject.toml may name a package, and nbdev reads the name there; settings.ini must not say another.
if dist.get_name() != name: raise SystemExit(f"settings.ini says lib_name = {name}, pyproject.toml says name = {dist.get_name()}")
