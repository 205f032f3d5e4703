"""Small SVG line charts, without a plotting library."""

import json

COLOURS = ["#c0392b", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#34495e"]


def chart(path, title, x_label, y_label, series, x_log=False):
    """series: {name: [(x, y)]}. Writes an SVG."""
    import math
    width, height, left, bottom, top, right = 720, 400, 64, 48, 36, 150
    points = [p for line in series.values() for p in line]
    if not points:
        return
    fx = (lambda x: math.log2(x)) if x_log else (lambda x: x)
    x0, x1 = min(fx(p[0]) for p in points), max(fx(p[0]) for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    y0 = 0.0 if y0 >= 0 and y0 < 0.5 * y1 else y0
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)
    px = lambda x: left + (fx(x) - x0) / (x1 - x0) * (width - left - right)
    py = lambda y: height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">' % (width, height),
           '<rect width="100%" height="100%" fill="white"/>',
           '<text x="%d" y="20" font-size="15">%s</text>' % (left, title)]
    for i in range(6):
        y = y0 + (y1 - y0) * i / 5
        out.append('<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%.3g</text>' %
                   (left, width - right, py(y), py(y), left - 6, py(y) + 4, y))
    ticks = sorted({p[0] for p in points}) if x_log else [x0 + (x1 - x0) * i / 5 for i in range(6)]
    for x in ticks:
        out.append('<text x="%.1f" y="%d" text-anchor="middle">%.4g</text>' % (px(x), height - bottom + 18, x))
    out.append('<text x="%d" y="%d" text-anchor="middle">%s</text>' % ((left + width - right) / 2, height - 10, x_label))
    out.append('<text transform="translate(16 %d) rotate(-90)" text-anchor="middle">%s</text>' % (height / 2, y_label))
    for i, (name, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        out.append('<polyline fill="none" stroke="%s" stroke-width="2" points="%s"/>' %
                   (colour, " ".join("%.1f,%.1f" % (px(x), py(y)) for x, y in line)))
        if len(line) <= 16:
            out += ['<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>' % (px(x), py(y), colour) for x, y in line]
        out.append('<text x="%d" y="%d" fill="%s">%s</text>' % (width - right + 8, top + 12 + 18 * i, colour, name))
    open(path, "w", encoding="utf-8").write("\n".join(out + ["</svg>"]) + "\n")


def curve(log, path):
    """The loss curve of a run."""
    records = [json.loads(line) for line in open(log, encoding="utf-8")]
    train = [(r["tokens"] / 1e6, r["entropy"]) for r in records]
    held = [(r["tokens"] / 1e6, r["nelbo"]) for r in records if "nelbo" in r]
    chart(path, "Training", "million positions", "nats a token",
          {k: v for k, v in {"at masked positions": train, "held-out bound": held}.items() if v})
