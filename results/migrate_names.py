"Rename settings in the tables of version 0.1; run once, in the top folder: python results/migrate_names.py"
import json
from pathlib import Path

SETTINGS = dict(unmasked='clean_weight')
FILLS = dict(other='swap', scaled='rescale')


def of_sgdrop(settings):
    "Settings of SGDrop with today's names"
    renamed = {({'share': 'p'} | SETTINGS).get(k, k): v for k, v in settings.items()}
    if 'fill' in renamed: renamed['fill'] = FILLS.get(renamed['fill'], renamed['fill'])
    return renamed


def benchmark_row(row):
    parts = row['settings']
    return row | dict(settings={k: of_sgdrop(v) if k == 'sgdrop' else v for k, v in parts.items()})


def trap_row(row):
    row = {'clean' if k == 'without' else k: v for k, v in of_sgdrop(row).items()}
    watch = [{'clean' if k == 'without' else k: v for k, v in epoch.items()} for epoch in row['watch']]
    return row | dict(watch=watch)


def migrate(path, change):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    new = []
    for row in rows:
        key = json.loads(row['key'])
        changed = change(row)
        settings = change(dict(key, watch=[])) if change is trap_row else change(key)
        settings.pop('watch', None)
        new.append(changed | dict(key=json.dumps(settings, sort_keys=True)))
    path.write_text(''.join(json.dumps(row) + '\n' for row in new))


for name in ('benchmark', 'search', 'tuning'): migrate(Path('results') / f'{name}.jsonl', benchmark_row)
migrate(Path('results') / 'traps.jsonl', trap_row)
