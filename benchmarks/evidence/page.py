"""Writes docs/evidence.md and its figures from what the other programs of this folder left in results/evidence.

    python benchmarks/evidence/page.py
"""

import argparse
import json
import statistics

import bits
import longer
import region
import time_to_quality
from compressions import METHODS
from report import DOCS, RATES, markdown, panels_for, prose, save
from runs import LEARNERS, QUALITY, RESULTS, calm, spread, summaries
from tuning import RATES as TUNED

# The PowerSGD paper's Tables 3 and 4: accuracy of ResNet-18 on CIFAR-10, and perplexity of an LSTM on WikiText-2.
PAPER = {
    "cnn": {
        "none": 94.3,
        "rank-1": 93.6,
        "rank-2": 94.4,
        "rank-4": 94.5,
        "rank-7": 94.6,
        "random-block-7": 93.3,
        "random-k-7": 94.0,
        "sign-norm": 93.9,
        "top-k-7": 94.4,
        "random-block-2": 87.8,
        "random-k-2": 92.6,
        "top-k-2": 93.6,
    },
    "lstm": {"none": 91, "rank-1": 102, "rank-2": 93, "rank-4": 91},
}
# Okabe and Ito's colours, which the colour-blind tell apart.
COLORS = ["#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]

INTRODUCTION = """What the papers of PowerSGD ([arXiv 1905.13727](https://arxiv.org/abs/1905.13727)) and Accordion
([arXiv 2010.16248](https://arxiv.org/abs/2010.16248)) claim, measured with this package on what 2 cores can learn
in minutes. {place} What was found, and what contradicts the papers, stands at the end of each part.

A CNN (four convolutions, 242 thousand parameters) learns scikit-learn's handwritten digits, 8 x 8 pixels with
normal noise (standard deviation 0.3) that is new in each step: 1,198 images to learn from, 599 to test, 128 in a
step, 20 epochs of 9 steps. One test image is 0.17%. An LSTM (one layer of 256 units, 1.2 million parameters, its
embedding shared with what scores the words) learns the first 40,992 words of Python's own sources, 512 in a step,
in 3 epochs of 80 steps; the perplexity is that of 10,240 words of other files. Both are trained by SGD with
momentum 0.9, a warm-up, and two decays of the learning rate; the LSTM's averaged gradient is clipped. **These
models are much smaller than the papers', and learn for 180 and 240 steps, in one part four times as many: what takes
thousands of steps to show, or to go away, is not seen here.**

`--data FOLDER` takes CIFAR-10 (data_batch_1 to data_batch_5, test_batch) or WikiText-2 (wiki.train.tokens and so
on) in place of the digits and of Python's sources, of which the same models learn a part, or all with `--whole`.
None of the numbers here are from these.

"Sent" is what one worker hands to Horovod in an epoch, as compression_stats() counts it. "Left" is what left its
network interface: of an allreduce 2 (W - 1) / W times as much with W workers, of an allgather W - 1 times, and
headers. Times are medians over the steps, of the workers' mean in each, and over the seeds. 4 workers on 2 cores
wait for each other's computing, and times vary by a third from run to run: read qualities and bytes first. Times in
brackets were disturbed: other programs kept a third of a core or more busy meanwhile."""
COMMANDS = """The commands, and the minutes that they took here; with `--seeds 1` each takes as long as one of its
seeds. Qualities and bytes come out the same again on the same machine, but for the last digits."""
TUNING = """The learning rates were chosen for plain SGD, from this line of multiples of the one that is used, with
a seed of its own; what is best, and has neighbours nearly as good, is used for every method. Signum's steps are of
another size, so that it has a learning rate of its own, chosen in the same way."""

RANKS = """PowerSGD's Table 3. "paper" is what the paper gives, for a ResNet-18 on CIFAR-10 and an LSTM with 28.9
million parameters on WikiText-2: another scale, to compare the order of the lines with."""
LONGER = """The same, in trainings {times} times as long: so many times the CNN's epochs, and the LSTM's words, of
which there are more different ones then, and more parameters. With links of 10 Gbit/s: it is the quality that counts
here."""
BITS = """Factors in fewer bits (`wire_dtype`), and whole gradients in 8 bits (`Int8`), in trainings as short as the
first, and in some that are 4 times as long. "Sent" is what a worker hands to Horovod in an epoch of a short one. Of an
allreduce 1.5 times as much leaves its host, with 4 workers; of numbers in 8 bits, which are averaged in slices
([compressors.md](compressors.md)), 1.2 times."""
COMPRESSORS = """PowerSGD's Table 4: sparsifiers that hand over as many bytes as rank 7 ("as rank 7", the paper's
medium compression) or rank 2 (high compression), and others. Every method but Signum has the hyperparameters of
plain SGD; so have Signum's vectors, which are not compressed. Top K sends each entry's place with it, and so has
half as many entries. What top K, sign and norm, Signum and Atomo send does not add up: every worker gathers what
all have sent, so that more leaves it the more workers there are."""
ACCORDION = """Accordion's Tables 1 and 2: less compression, more compression, and Accordion, which chooses between
the two for each matrix, each epoch of the CNN and each quarter epoch of the LSTM, with the paper's threshold of
0.5. "M floats" is what a worker handed over in the whole training, in millions; "low compression" is the part of
the steps for which Accordion chose the less compressed level."""
WHOLE = """Whole trainings, with the same batches of all workers together: the seconds from the first step until the
CNN's test accuracy is {cnn:g}%, and the LSTM's perplexity {lstm:g}, without the evaluations in between; and how
many times sooner that is than with plain Horovod, over the seeds in which both get there. The evaluations come once
an epoch of the CNN and four times an epoch of the LSTM. At 100 Mbit/s there is one seed. The figure shows the first
seed."""
ABLATIONS = """Rank 2 without one of its parts, and with more of them. A half-step is one product with a basis and
one allreduce; PowerSGD has 2 in a step. "The best matrix of rank 2" is a singular value decomposition of each
worker's gradient. "memory" is the norm of all that a worker's error-feedback memory holds at the end. The last two
lines of the CNN are PowerSGD as a user would write it (compressions.py), with either rule of
[memory.md](memory.md)."""
REGION = """One exchange of a model that is {matrices} square matrices and as many vectors, with nearly no backward:
how many times less time it takes at rank 4. (The workers' mean times, medians over the steps.)"""
REGION_PLAIN = """Than with plain Horovod, by the number of parameters; where plain Horovod is faster, in bold:"""
REGION_HALF = """Than with Horovod's fp16:"""
REGION_AUTO = "`hvd.Auto`, with fp16 and rank 4 as its candidates, than with plain Horovod:"
FOUND = {
    "ranks": """As in the paper, quality rises with the rank, and rank 4 of the CNN is as good as plain SGD within
    what the seeds differ by. Against the paper, rank 1 and 2 lose more, and the LSTM's rank 4 is worse than plain
    SGD, where the paper's is as good. Both trainings are short: what is left out of one step arrives some steps
    later, and these have 180 and 240 steps in place of tens of thousands; longer ones are next. Bytes shrink as in
    the paper: by the model's shapes.""",
    "longer": """The CNN's loss goes away with more steps: rank 4 is as good as plain SGD, and ranks 1 and 2, which
    were 4 and 2 points behind, are less than one behind. **The LSTM's does not: against the paper, rank 4 is
    behind by 4 of perplexity in the one as in the other.** Rank 7 is as good as plain SGD within what the seeds
    differ by, as in the short trainings (below): a language model may want a higher rank than the paper's 4.""",
    "bits": """**Rank 8 in 8 bits is as good as plain SGD**, within one standard deviation of it in all four trainings,
    where rank 4 in full precision is not in either of the LSTM's; it hands over 0.7 times rank 4's bytes, and 0.56
    times as much leaves the host. Rounding to 8 bits loses nothing that the seeds show, from rank 4 on, in short
    trainings as in long ones: a rank is as good in 8 bits as in half and in full precision, which sends two to three
    times as much. (Rank 16 ends the LSTM's long training 1 to 1.4 higher with fewer bits, where rank 8 ends: within
    what seeds differ by.) Int8 is as good as plain SGD, from a third of its bytes. Half of rank 4's bytes
    is not enough here: rank 6 in 8 bits, which hands over 0.45 times as much, ended the LSTM's long training at 54.8
    (one seed, on another machine), where plain SGD ended at 52.2, rank 8 in 8 bits at 52.7, and rank 4 at 55.9.

    4 bits a number were tried and left out, with these results: of what sends as many bytes, the LSTM wants 8 bits.
    Rank 4 in 8 bits is better than rank 8 in 4, and in the long training rank 16 in 4 loses 2.4 of perplexity to rank
    8 in 8. (The CNN loses nothing at rank 4 in 4 bits, a quarter of rank 4's bytes.)""",
    "compressors": """At high compression, rank 2 and top K are the best of the CNN, then random K, and random block
    last, as in the paper. At medium compression rank 7 is as good as plain SGD, and top K and sign and norm are
    close behind; random K and random block are further behind than in the paper, and gain little or nothing from
    three times as many bytes. **Against the paper, top K learns better than rank 2 from as many bytes handed over,
    in the LSTM, and as well in the CNN.** But what it sends is gathered: with 4 workers up to twice as much leaves
    each of them, with more workers more, and a batch takes longer. Sign and norm fails with the LSTM at the
    learning rate of plain SGD, and so does random K. Signum needs a learning rate of its own, for which the paper's
    2000th is too small in trainings as short as these; with a tuned one it is as good as plain SGD.""",
    "accordion": """**Against its paper, Accordion does not reach the quality of its low compression here**: it lies
    between its two levels, in quality as in floats sent. In the CNN it takes an eighth of the steps for critical,
    where rank 2 would have been needed in more. Of top K, both levels learn equally well within what seeds differ
    by, so that Accordion has nothing to lose, and sends a fourth of the floats of the lower compression, but more
    than twice those of the higher one. These trainings have 20 and 12 intervals; the paper's have 30 of 10 epochs
    each.""",
    "time_to_quality": """PowerSGD needs more steps to the same quality, and each of them is shorter where the links
    are slow. At 100 Mbit/s the LSTM gets there 9 to 10 times sooner, the CNN, whose gradients take 1 MB, 3 to 5
    times. At 1 Gbit/s rank 4 halves the LSTM's time, which fp16 cuts by a third; rank 2 does not get there with
    every seed, and the CNN gains nothing. **At 10 Gbit/s both are slower than plain Horovod**, and fp16 is what
    helps the LSTM.""",
    "ablations": """As in the paper, quality is lost without error feedback, and the unbiased approximation is far
    behind. The warm start matters less here: in the CNN not at all, in the LSTM by 2 or 3 of perplexity. Four
    half-steps come close to the best matrix of that rank, and eight are no better. From a random start, four
    half-steps are as good as two from a warm one, for twice the bytes: that is what `refresh_every` does now and
    then. A fresh start every 20 steps sends at most 3% more, and changes quality by less than seeds do: what it is
    good for are gradients that the warm start cannot find (compressors.md). One half-step of rank 2 sends as much
    as rank 1 with two (above), and is as good within what seeds differ by. With the averaged Q in place of the
    worker's own, quality is the same, as it must be: the mean of the memories is the same. But each is three times
    as large after 180 steps, and goes on growing (memory.md).""",
    "region": """**Plain allreduce is faster when the model is small for the link.** PowerSGD's exchange is the
    faster one from about 10 thousand parameters on at 100 Mbit/s, from about 100 thousand at 1 Gbit/s, and from
    half a million at 10 Gbit/s and without a limit, with 2 hosts as with 4; against fp16 it takes up to four times
    as many. With less, an exchange is all calls and latency, and PowerSGD has two rounds of messages in a step.
    Beside a backward that takes long, the exchange is a smaller part of a step, and no more than that part can be
    saved. And what is saved in each step has to pay for the steps that compression adds: at 10 Gbit/s the LSTM
    above, with more than a million parameters, gains nothing by it. hvd.Auto finds out for itself
    ([planning.md](planning.md)).""",
}

# Not measured any more.
IN_4_BITS = markdown(
    ["", "CNN, MB sent", "accuracy, %", "long", "LSTM, MB sent", "perplexity", "long"],
    [
        ["PowerSGD, rank 4, int4", 0.09, "93.2 ± 0.3", "", "2.50", "81.5 ± 0.9", ""],
        ["PowerSGD, rank 8, int4", 0.19, "93.4 ± 0.6", "", 3.56, "78.4 ± 2.5", ""],
        ["PowerSGD, rank 16, int4", "0.30", "93.3 ± 0.7", "94.4 ± 0.3", 5.69, "74.2 ± 1.6", "55.9 ± 1.4"],
    ],
)


def read(name):
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {"rows": []}


def time_cell(rows, key, digits):
    """The median of the rows whose times nobody disturbed; of all of them, in brackets, if there are none."""
    time = f"{statistics.median(row[key] for row in calm(rows) or rows):.{digits}f}"
    return time if calm(rows) else f"({time})"


def megabytes(rows, key):
    return f"{statistics.mean(row[key] for row in rows) / 1e6:,.2f}"


def runs_table(rows, learner, paper=False, extra=()):
    """A line for each method. `extra` are (title, function of its rows)."""
    body = []
    for (whose, method), group in summaries(rows).items():
        if whose == learner:
            line = [METHODS[method].title, spread([row["quality"] for row in group], 1)]
            line += [PAPER[learner].get(method, "")] if paper else []
            line += [megabytes(group, "bytes_per_epoch"), megabytes(group, "wire_bytes_per_epoch")]
            line.append(time_cell(group, "step_ms", 0))
            body.append(line + [cell(group) for _, cell in extra])
    head = [LEARNERS[learner], QUALITY[learner], *(["paper"] if paper else [])]
    return markdown([*head, "MB sent", "MB left", "ms a batch", *(title for title, _ in extra)], body)


def both_tables(rows, paper=False, extra=()):
    learners = dict.fromkeys(row["learner"] for row in rows)
    return "\n".join(runs_table(rows, learner, paper, extra) for learner in learners)


def bits_table(rows):
    """A line for each method: what it sends, and its quality in the short and, where there are any, long trainings."""
    lengths = sorted({row["times"] for row in rows})
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [METHODS[method].title]
        for learner in LEARNERS:
            of_both = [row for row in rows if (row["learner"], row["method"]) == (learner, method)]
            groups = [[row for row in of_both if row["times"] == times] for times in lengths]
            line.append(megabytes(groups[0], "bytes_per_epoch") if groups[0] else "")
            line += [spread([row["quality"] for row in group], 1) if group else "" for group in groups]
        body.append(line)
    heads = [[f"{name}, MB sent", QUALITY[learner], "long"][: 1 + len(lengths)] for learner, name in LEARNERS.items()]
    return markdown(["", *sum(heads, [])], body)


def millions_of_floats(rows):
    """Handed to Horovod in the whole training."""
    return f"{statistics.mean(r['bytes_per_epoch'] / r['steps_per_epoch'] * r['steps'] / 4e6 for r in rows):,.2f}"


def seconds(rows):
    return time_cell(rows, "seconds", 1)


def low_part(rows):
    """The part of the steps in which Accordion compressed little, the mean of all matrices."""
    parts = []
    for row in rows:
        for decisions in row.get("decisions", ()):
            ends = [step for step, _ in decisions[1:]] + [row["steps"]]
            low = sum(end - step for (step, level), end in zip(decisions, ends) if level == "low")
            parts.append(low / row["steps"])
    return f"{100 * statistics.mean(parts):.0f}%" if parts else ""


def memory(rows):
    return spread([row["memory"] for row in rows], 1)


def tuning_table(rows):
    body = []
    for learner, method in TUNED:
        found = [row for row in rows if (row["learner"], row["method"]) == (learner, method)]
        if found:
            title = f"{LEARNERS[learner]}, {METHODS[method].title}, {QUALITY[learner]}"
            body.append([title, *(f"{row['rate']:g}x: {row['quality']:.1f}" for row in found)])
    return markdown(["", *[""] * max(len(line) - 1 for line in body)], body)


def whole_runs_table(rows, learner):
    links = [rate for rate in RATES if any(row["links"] == rate for row in rows)]
    body = []
    for method in time_to_quality.METHODS:
        line = [METHODS[method].title]
        for rate in links:
            time, gain = time_to_quality.cells(rows, learner, rate, method)
            line += [time, gain]
        body.append(line)
    return markdown([LEARNERS[learner], *(title for rate in links for title in (RATES[rate], "sooner"))], body)


def region_table(rows, method, over):
    places = dict.fromkeys((row["hosts"], row["rate"]) for row in rows)
    widths = sorted({row["width"] for row in rows})
    body = []
    for hosts, rate in places:
        body.append([f"{hosts} hosts, {RATES[rate]}"])
        for width in widths:
            gain = region.gain(rows, hosts, rate, width, method, over)
            group = [row for row in rows if (row["hosts"], row["rate"], row["width"]) == (hosts, rate, width)]
            cell = "" if gain is None else f"{gain:.2f}x" if gain >= 1 else f"**{gain:.2f}x**"
            body[-1].append(cell if calm(group) else f"({cell})")
    return markdown(["", *(f"{region.MATRICES * width**2:,}" for width in widths)], body)


def qualities_figure(rows, file):
    """Quality against bytes: a panel for each learner. PowerSGD's names stand to the left of the points."""
    learners = [learner for learner in LEARNERS if any(row["learner"] == learner for row in rows)]
    figure, panels = panels_for(learners, width=5, height=4)
    for panel, learner in panels:
        for (whose, method), group in summaries(rows).items():
            if whose == learner and not METHODS[method].signs:
                sent = statistics.mean(row["bytes_per_epoch"] for row in group) / 1e6
                qualities = [row["quality"] for row in group]
                error = statistics.stdev(qualities) if len(qualities) > 1 else 0
                ours = method.startswith("rank") or method == "none"
                color = COLORS[2] if ours else COLORS[3]
                panel.errorbar(sent, statistics.mean(qualities), error, color=color, marker="o", markersize=4)
                name = METHODS[method].title.removeprefix("PowerSGD, ").removesuffix(" (Horovod)")
                place = dict(xytext=(-5, -6), ha="right") if ours else dict(xytext=(5, -2))
                point = sent, statistics.mean(qualities)
                panel.annotate(name, point, textcoords="offset points", fontsize=7, **place)
        set_qualities(panel, learner, LEARNERS[learner])
        panel.margins(x=0.3)
    return save(figure, file)


def set_qualities(panel, learner, title):
    """Makes a panel one of quality against bytes: the better, the higher."""
    panel.set(xscale="log", xlabel="MB that a worker sends in an epoch", ylabel=QUALITY[learner])
    panel.set_title(title)
    if learner == "lstm":
        panel.invert_yaxis()


def bits_figure(rows):
    """Quality against bytes: a panel for each learner, a line for each precision, whose points are ranks."""
    figure, panels = panels_for(list(LEARNERS), width=5, height=4)
    lines = {label: [f"rank-{rank}{end}" for rank in bits.RANKS] for label, end in bits.PRECISIONS.items()}
    lines |= {"Int8": ["int8"], "none (Horovod)": ["none"]}
    for panel, learner in panels:
        groups = {method: group for (whose, method), group in summaries(rows).items() if whose == learner}
        for (label, methods), color, marker in zip(lines.items(), [*COLORS[1:4], *COLORS[:1] * 2], "ooosx"):
            some = [groups[method] for method in methods if method in groups]
            sent = [statistics.mean(row["bytes_per_epoch"] for row in group) / 1e6 for group in some]
            quality = [statistics.mean(row["quality"] for row in group) for group in some]
            panel.plot(sent, quality, color=color, marker=marker, markersize=4, label=label)
        set_qualities(panel, learner, f"{LEARNERS[learner]}, ranks {', '.join(map(str, bits.RANKS))}")
    panels[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    return save(figure, "evidence-bits")


def curves_figure(rows):
    """Quality against time: a panel for each learner and rate, first seed."""
    places = [
        (learner, rate)
        for learner in LEARNERS
        for rate in RATES
        if any((row["learner"], row["links"]) == (learner, rate) for row in rows)
    ]
    figure, panels = panels_for(places, width=2.6, height=3)
    for panel, (learner, rate) in panels:
        for method, color in zip(time_to_quality.METHODS, COLORS):
            for row in rows:
                if (row["learner"], row["links"], row["method"], row["seed"]) == (learner, rate, method, 0):
                    _, times, qualities = zip(*row["curve"])
                    panel.plot(times, qualities, color=color, label=METHODS[method].title)
        target = time_to_quality.TARGETS[learner]
        panel.axhline(target, color="black", linewidth=0.8, linestyle=":")
        panel.set(xlabel="seconds", xlim=(0, None), ylabel=QUALITY[learner])
        panel.set_ylim((60, 95) if learner == "cnn" else (4 * target, 0.9 * target))
        panel.set_title(f"{LEARNERS[learner]}, {RATES[rate]}", fontsize=10)
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    return save(figure, "evidence-time")


def region_figure(rows):
    """How many times faster than plain allreduce, against the size: a panel for each number of hosts."""
    hosts = sorted({row["hosts"] for row in rows})
    figure, panels = panels_for(hosts, width=4, height=3.2, sharey=True)
    for panel, count in panels:
        for rate, color in zip(RATES, COLORS[1:]):
            widths = sorted({row["width"] for row in rows if (row["hosts"], row["rate"]) == (count, rate)})
            gains = [region.gain(rows, count, rate, width, "rank-4") for width in widths]
            if widths:
                sizes = [region.MATRICES * width**2 for width in widths]
                panel.plot(sizes, gains, color=color, marker="o", markersize=3, label=RATES[rate])
        panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", yscale="log", xlabel="parameters", title=f"{count} hosts")
        panel.yaxis.set_major_formatter("{x:g}x")
        panel.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel("plain Horovod's time / rank 4's")
    return save(figure, "evidence-region")


def place_of(measured):
    if measured["obstacle"] is None:
        return (
            "4 workers on hosts that are network namespaces of one machine with "
            f"{measured['cores']} cores, joined by links of 1 Gbit/s where nothing else is said."
        )
    return f"4 workers shared the loopback interface of a machine with {measured['cores']} cores."


def commands_table(parts):
    body = []
    for name, part in parts.items():
        if part["rows"]:
            found = {}
            for row in part["rows"]:
                found.setdefault(LEARNERS.get(row.get("learner")), set()).add(row.get("seed"))
            counts = {learner: len(seeds) for learner, seeds in found.items() if learner}
            told = ", ".join(f"{count} ({learner})" for learner, count in counts.items())
            body.append([f"`python benchmarks/evidence/{name}.py`", told, f"{part['minutes']:.0f}"])
    return markdown(["", "seeds", "minutes"], body)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    names = ["tuning", "ranks", "longer", "bits", "compressors", "accordion", "time_to_quality", "ablations", "region"]
    parts = {name: read(name) for name in names}
    rows = {name: part["rows"] for name, part in parts.items()}
    measured = next((part for part in parts.values() if part["rows"]), None)
    if measured is None:
        raise SystemExit("There are no results: run benchmarks/evidence/ranks.py or its neighbours first")
    page = ["# Evidence\n", prose(INTRODUCTION, place=place_of(measured))]
    page += [prose(COMMANDS), "\n", commands_table(parts)]
    if rows["tuning"]:
        page += [prose(TUNING), "\n", tuning_table(rows["tuning"])]
    if rows["ranks"]:
        page += ["\n## Quality, bytes and time by rank\n", prose(RANKS), "\n", both_tables(rows["ranks"], paper=True)]
        page += [qualities_figure(rows["ranks"] + rows["compressors"], "evidence-quality"), prose(FOUND["ranks"])]
    if rows["longer"]:
        page += ["\n## Longer trainings\n", prose(LONGER, times=longer.TIMES), "\n", both_tables(rows["longer"])]
        page.append(prose(FOUND["longer"]))
    if rows["bits"]:
        page += ["\n## Fewer bits\n", prose(BITS), "\n", bits_table(rows["bits"])]
        short = [row for row in rows["bits"] if row["times"] == 1]
        page += [bits_figure(short), prose(FOUND["bits"]), "\n", IN_4_BITS]
    if rows["compressors"]:
        page += ["\n## Other compressors\n", prose(COMPRESSORS), "\n", both_tables(rows["compressors"], paper=True)]
        page.append(prose(FOUND["compressors"]))
    if rows["accordion"]:
        extra = [("M floats", millions_of_floats), ("s", seconds), ("low compression", low_part)]
        page += ["\n## Accordion\n", prose(ACCORDION), "\n", both_tables(rows["accordion"], extra=extra)]
        page.append(prose(FOUND["accordion"]))
    if rows["time_to_quality"]:
        page += ["\n## Time to a quality\n", prose(WHOLE, **time_to_quality.TARGETS)]
        for learner in dict.fromkeys(row["learner"] for row in rows["time_to_quality"]):
            page += ["\n", whole_runs_table(rows["time_to_quality"], learner)]
        page += [curves_figure(rows["time_to_quality"]), prose(FOUND["time_to_quality"])]
    if rows["ablations"]:
        page += ["\n## Without its parts\n", prose(ABLATIONS), "\n"]
        page.append(both_tables(rows["ablations"], extra=[("memory", memory)]))
        page.append(prose(FOUND["ablations"]))
    if rows["region"]:
        page += ["\n## When it does not help\n", prose(REGION, matrices=region.MATRICES), region_figure(rows["region"])]
        page += [prose(REGION_PLAIN), "\n", region_table(rows["region"], "rank-4", "hvd")]
        page += [prose(REGION_HALF), "\n", region_table(rows["region"], "rank-4", "hvd-fp16")]
        if any(row["method"] == "auto" for row in rows["region"]):
            page += [prose(REGION_AUTO), "\n", region_table(rows["region"], "auto", "hvd")]
        page.append(prose(FOUND["region"]))
    (DOCS / "evidence.md").write_text("".join(page))
    print(f"{DOCS / 'evidence.md'} and its figures are written")


if __name__ == "__main__":
    main()
