"""The default text of `validate-kimi`: prose, a list, code, numbers, other scripts."""

BUILT_IN = "the built-in text"  # its name in reports

TEXT = """\
The tide tables for the harbour hang beside the door of the chandlery, next to a barometer that nobody has
trusted since the winter of the long frost. On a day like this one, with the wind backing to the south-east
and the light going flat over the water, old Marten taps the glass twice all the same, out of politeness, and
goes down to look at his lines. He keeps nine pots along the inner reef. Six of them will be empty; he knows
which.

What is a harbour? A place where the sea is asked to wait. Engineers give a duller answer: a body of water
sheltered by nature or by walls, deep enough for the ships that use it, with a bottom that holds an anchor.
Both answers are right, and neither tells you why the smell of tar and diesel makes people walk more slowly.

Three things to check before going out:
1. fuel, for there and back and half as much again;
2. the forecast, read twice, at 06:15 and at 07:45;
3. somebody on land who knows when you mean to return.

def tide_height(hours, mean=2.4, amplitude=1.7, period=12.42):
    \"\"\"Height of the water in metres, `hours` after high tide.\"\"\"
    phase = 2 * math.pi * hours / period
    return mean + amplitude * math.cos(phase)

for h in range(0, 13, 3):
    print(f"{h:2d} h  {tide_height(h):5.2f} m")

In 1887 the breakwater was lengthened by 310 metres at a cost of 48,650 crowns; in 1953 the sea took 27 of
them back in one night. The account books of the harbour board say "Neubau dringend erforderlich", then, a
year later, « remis à plus tard », and after that nothing at all. 海は待ってくれない。
港口的灯塔每十秒闪两次。 Маяк виден за восемнадцать миль. The lamp turns once in ten seconds and shows two
flashes, then dark, then two flashes again, and if you stand under it long enough you find that you are
counting: one, two, and eight; one, two, and eight.
"""
