"""Room `drill`, storey 8: faults planted in a small run on purpose, and what they cost. May import everything.


kinds.py     the kinds of faults and the moments at which they come; a plan of them, drawn from a seed
preload.py   what the fork server of warm ranks imports
planted.py   what a rank does to itself at its moment: it is killed, stops, raises, ... (no production code knows it)
rank.py      one rank of the drill: gpt4moe.train's main, with its faults planted
launches.py  starts the ranks of a launch, measures how long they were dead, ends them when they hang
scene.py     the run that is drilled: its overrides, its data; bits flipped in its files
drill.py     the same command again and again, a fault in each launch, until the run is done
account.py   every step once and equal to the last bit; availability, measured and by its formula
page.py      the table, on the terminal and in docs/drill.md
command.py   `make drill`
"""
