"""Medians, spread and ratios of the lines that devices.sh prints: WORKLOAD NAME FIGURE CPU.

Of rates more is better; of milliseconds, those of attach, less is.
"""
import collections
import statistics
import sys

# What is compared with what. The best of several peers counts.
RATIOS = [
    ('ublk, memory, beside the best nbd peer', 'sheave-ublk-memory', ['nbdkit-memory']),
    ('nbd, memory, beside the best nbd peer', 'sheave-nbd-memory', ['nbdkit-memory']),
    ('ublk, file, beside the best nbd peer', 'sheave-ublk-file', ['nbdkit-file', 'qemu-nbd-file']),
    ('nbd, file, beside the best nbd peer', 'sheave-nbd-file', ['nbdkit-file', 'qemu-nbd-file']),
    ('ublk, file, beside loop', 'sheave-ublk-file', ['loop-file']),
    ('ublk, direct file, beside rublk', 'sheave-ublk-direct', ['rublk-file']),
    ('ublk, null, beside rublk', 'sheave-ublk-null', ['rublk-null']),
    ('attach, nbd, beside nbd-client to nbdkit', 'sheave-nbd', ['nbd-client-nbdkit']),
    ('attach, ublk, beside nbd-client to nbdkit', 'sheave-ublk', ['nbd-client-nbdkit']),
    ('attach, nbd, beside nbdkit and nbd-client', 'sheave-nbd', ['nbd-client-new-nbdkit']),
    ('attach, ublk, beside nbdkit and nbd-client', 'sheave-ublk', ['nbd-client-new-nbdkit']),
]

figures = collections.defaultdict(lambda: collections.defaultdict(list))
for line in sys.stdin:
    workload, name, figure, cpu = line.split()
    figures[workload][name].append((float(figure), float(cpu)))

for workload, names in figures.items():
    unit = 'ms' if workload == 'attach' else 'requests/s'
    print(f'\n{workload} ({unit})')
    medians = {}
    for name, runs in names.items():
        rates, cpus = zip(*runs)
        medians[name] = statistics.median(rates)
        print(f'  {name:24}{medians[name]:10.0f}  {min(rates):.0f} to {max(rates):.0f}'
              f'{statistics.median(cpus):10.1f} us of CPU')
    for what, mine, peers in RATIOS:
        if mine in medians and all(peer in medians for peer in peers):
            best = max(medians[peer] for peer in peers)
            print(f'  {medians[mine] / best:5.2f}  {what}')
