"""The model behind `adaptive`: every binary decision is predicted by mixing, in integers only.

A symbol is binarised: non-zero?, sign, magnitude > 1, > 2, ... (12 steps), then exp-Golomb of
order 2. Whether a symbol is non-zero is predicted by rates that multiply, as a Poisson model has
them: with `g` the density of all symbols so far, row i has the rate (n_i + a) / (e_i + a), where n
counts its non-zeros so far and e those that the columns' rates made us expect (so a dead column
is no evidence against a row); likewise columns, pairs of neighbouring columns, the previous row,
the near neighbourhood, and the block (one convolution kernel) that the symbol lies in. Their log
odds, and those of six small tables of adaptive counters, are mixed by online logistic regression
(Mahoney 2005, "Adaptive weighing of context models for lossless data compression", section 3). The
decision is then coded by a range coder with carry.

All numbers are integers below 2^63, so a compiled and an uncompiled run, and every machine, agree
to the bit. Log odds are in units of 1/256 nat, probabilities in 1/65536, rates in 2^-22.
"""

from __future__ import annotations

from typing import Any


def code_symbols(  # one function on purpose: both directions, compiled or not, share it
    symbols: Any,  # [rows * cols]
    rows: Any,
    cols: Any,
    block: Any,
    prefix: Any,
    width: Any,
    data: Any,
    decoding: Any,
    settings: Any,
    squash: Any,
    stretch: Any,
    small: Any,
    lengths: Any,
    slots: Any,
    ages: Any,
    weights: Any,
    trained: Any,
    plain: Any,
    plain_ages: Any,
    col_hits: Any,
    col_sum: Any,
    col_signs: Any,
    col_expect: Any,
    block_seen: Any,
    context: Any,
    inputs: Any,
    hits: Any,
    expects: Any,
    priors: Any,
) -> Any:
    """Kernel: code `symbols` into `data`, or decode them from it.

    Args:
        block: columns of one block, or 1.
        prefix: a number of `width` bits that goes before the symbols.

    Returns:
        the bytes written, -1 where `data` has no room, -2 where a magnitude is out of range.
    """
    n_in, room, end = 16, len(data), 0
    low, span, code = 0, (1 << 32) - 1, 0
    if decoding:
        for k in range(4):
            code = code << 8 | (data[k] if k < room else 0)
        end = 4
    total, density, row_hits, row_expect, guess = 0, 0, 0, 0, 0
    for i in range(-1 if width else 0, rows):  # row -1 is the prefix
        if i > 0:
            rate = (((row_hits << 22) + priors[1]) << 16) // (row_expect + priors[1])
            step = density * min(rate, 1 << 24) >> 16
            for j in range(cols):
                col_expect[j] += step
        hits[7], expects[7] = row_hits, row_expect
        row_hits, row_expect, row_sum, row_signs, recent = 0, 0, 0, 0, 0
        block_hits, block_expect = 0, 0
        for j in range(cols if i >= 0 else 1):
            at = i * cols + j
            value, size, negative, part, extra, raw, direct = 0, 0, 0, 0, 0, 0, 0
            left, left2, up, up2, slant, behind = 0, 0, 0, 0, 0, 0
            stage = 0  # 0 non-zero, 1 sign, 2.. magnitude, 14 exponent, 15 verbatim bits
            if i < 0:
                stage, raw, direct = 15, width, prefix
            else:
                part = j // block
                if j % block == 0:
                    block_hits, block_expect = 0, 0
                if not decoding:
                    value = symbols[at]
                    size = abs(value)
                left = symbols[at - 1] if j > 0 else 0
                left2 = symbols[at - 2] if j > 1 else 0
                behind = symbols[at - block] if j >= block > 1 else 0
                if i > 0:
                    up = symbols[at - cols]
                    up2 = symbols[at - 2 * cols] if i > 1 else 0
                    slant = min(abs(symbols[at - cols - 1]), 1) if j > 0 else 0
                    slant += min(abs(symbols[at - cols + 1]), 1) if j + 1 < cols else 0
            m_left, m_up, m_behind = abs(left), abs(up), abs(behind)
            m_left2, m_up2 = abs(left2), abs(up2)
            while True:
                # 1. which decision, and what is known about it
                kind, bit, base, group, set0, set1 = 0, 0, 0, 0, 0, 0
                if stage == 15:
                    bit = (direct >> (raw - 1)) & 1
                elif stage == 0:
                    bit = 1 if size > 0 else 0
                    density = (total << 22) + settings[9] * 64 * settings[10]
                    density //= at + settings[10]
                    p = min(max(density, 16), 4194240)
                    base = small[p] if p < 65536 else stretch[p >> 6]
                    a, b = max(j - 1, 0), min(j + 1, cols - 1)
                    c, d = max(j - 2, 0), min(j + 2, cols - 1)
                    hits[0], expects[0] = row_hits, row_expect
                    hits[1], expects[1] = row_hits, row_expect
                    hits[2], expects[2] = col_hits[j], col_expect[j]
                    hits[3], expects[3] = col_hits[j], col_expect[j]
                    hits[4] = col_hits[a] + col_hits[b] + col_hits[c] + col_hits[d]
                    expects[4] = col_expect[a] + col_expect[b] + col_expect[c] + col_expect[d]
                    hits[5] = 2 * (min(m_left, 1) + min(m_up, 1) + min(m_behind, 1))
                    hits[5] += min(m_left2, 1) + min(m_up2, 1) + slant
                    hits[6], expects[6] = 0, 0
                    if block > 1:
                        hits[6], expects[6] = block_hits, block_expect
                    guess, side, near, col_rate = density, 0, 0, 0
                    for r in range(8):
                        if r == 5:  # the near rate compares with row times column
                            expects[5] = guess * settings[8] >> 4
                        rate = (((hits[r] << 22) + priors[r]) << 16) // (expects[r] + priors[r])
                        rate = min(rate, 1 << 24)
                        p = density * rate >> 16
                        if r == 1 or r == 3:
                            guess = min(guess * rate >> 16, 1 << 24)
                            col_rate = p
                        elif r == 4:
                            side = rate >> 13
                        elif r == 5:
                            near = rate >> 12
                        p = min(max(p, 16), 4194240)
                        inputs[7 + r] = (small[p] if p < 65536 else stretch[p >> 6]) - base
                    row_expect += col_rate
                    block_expect += guess
                    inputs[6] = base
                    p = min(max(guess, 16), 4194240)
                    odds = small[p] if p < 65536 else stretch[p >> 6]
                    odds = (min(max(odds, -2559), 1535) + 2560) // settings[11]
                    context[0] = odds
                    context[1] = odds * 4 + min(recent, 1) + 2 * min(m_up, 1)
                    context[2] = min(m_left, 2) + 3 * min(m_left2, 2) + 9 * min(m_up, 2)
                    context[2] += 27 * min(m_up2, 2) + 81 * slant
                    context[3] = 0
                    if block > 1:
                        context[3] = lengths[min(block_hits, 64)] * 8
                        context[3] += lengths[min(block_seen[part], 64)]
                        context[3] = context[3] * 3 + min(m_behind, 2)
                    context[4] = min(lengths[min(near, 4095)], 7) * 8
                    context[4] += min(lengths[min(side, 4095)], 7)
                    context[5] = min(row_hits, 3) * 16 + lengths[min(j, 4095)]
                    set0 = min(row_hits, 2) * 3 + min(col_hits[j], 2)
                    set1 = min(m_left + m_up, 2)
                elif stage == 1:
                    kind = 1
                    bit = 1 if value < 0 else 0
                    a = 1 if left > 0 else (2 if left < 0 else 0)
                    b = 1 if up > 0 else (2 if up < 0 else 0)
                    c = 1 if behind > 0 else (2 if behind < 0 else 0)
                    d = min(max(row_signs, -3), 3) + 3
                    e = min(max(col_signs[j], -3), 3) + 3
                    context[0], context[1], context[2] = d, e, d * 7 + e
                    context[3], context[4] = a * 9 + b * 3 + c, b * 7 + e
                    context[5] = c * 3 + a
                else:
                    kind = 2
                    if stage < 14:
                        group = stage - 2
                        bit = 1 if size >= stage else 0
                    else:
                        group = 12 + min(extra, 3)
                        bit = 1 if (size - 9) >> (extra + 3) > 0 else 0
                    a = 4 * row_sum // max(row_hits, 1)
                    b = 4 * col_sum[j] // max(col_hits[j], 1)
                    context[0] = lengths[min(a, 4095)]
                    context[1] = lengths[min(b, 4095)]
                    context[2] = min(m_left, 3) * 4 + min(m_up, 3)
                    context[3] = min(m_left + m_left2 + m_up + m_up2, 31)
                    context[4] = lengths[min(row_hits, 64)]
                    context[5] = lengths[min(col_hits[j], 64)]
                    for k in range(6):
                        context[k] += group * 32
                    set0, set1 = group, group
                # 2. the prediction
                p, p0, p1 = 32768, 0, 0
                s0, s1, o = kind * 32 + set0, 96 + kind * 32 + set1, kind * 32 + group
                if stage < 15:
                    if kind > 0:
                        guess = plain[o] << 6
                        for k in range(7, 15):
                            inputs[k] = 0
                        inputs[6] = stretch[plain[o]]
                    inputs[15] = 256
                    for k in range(6):
                        s = (k * 3 + kind) * 512 + context[k]
                        if slots[s] < 0:  # a context never seen takes what is known without it
                            p = density if kind == 0 and k > 1 else guess
                            slots[s] = min(max(p, 16), 4000000)
                        context[k] = s
                        p = slots[s]
                        inputs[k] = (small[p] if p < 65536 else stretch[p >> 6]) - base
                    a, b = 0, 0
                    for k in range(n_in):
                        a += weights[s0 * n_in + k] * inputs[k]
                        b += weights[s1 * n_in + k] * inputs[k]
                    a = min(max(a >> 16, -3071), 3071)
                    b = min(max(b >> 16, -3071), 3071)
                    p0, p1 = squash[a + 3071], squash[b + 3071]
                    p = squash[((a + b) >> 1) + 3071]
                # 3. the range coder; a one takes the upper part, so that zeros leave no bytes
                bound = (span >> 16) * p
                if decoding:
                    bit = 1 if code >= span - bound else 0
                    if bit:
                        code -= span - bound
                elif bit:
                    low += span - bound
                    if low >> 32:
                        low &= 4294967295
                        k = end - 1
                        while data[k] == 255:
                            data[k] = 0
                            k -= 1
                        data[k] += 1
                span = bound if bit else span - bound
                while span < 1 << 24:
                    span <<= 8
                    if decoding:
                        code = code << 8 | (data[end] if end < room else 0)
                    else:
                        if end + 4 >= room:
                            return -1
                        data[end] = low >> 24
                        low = (low << 8) & 4294967295
                    end += 1
                # 4. learning
                if stage < 15:
                    a = ((bit << 16) - p0) * (
                        settings[12] + settings[13] * 16 // (16 + trained[s0])
                    )
                    b = ((bit << 16) - p1) * (
                        settings[12] + settings[13] * 16 // (16 + trained[s1])
                    )
                    trained[s0] += 1
                    trained[s1] += 1
                    for k in range(n_in):
                        weights[s0 * n_in + k] += (inputs[k] * a + 8388608) >> 24
                        weights[s1 * n_in + k] += (inputs[k] * b + 8388608) >> 24
                    for k in range(6):
                        s = context[k]
                        slots[s] += (bit * 4194303 - slots[s]) * 2 // (2 * ages[s] + settings[14])
                        slots[s] = min(max(slots[s], 16), 4194240)
                        if ages[s] < settings[15]:
                            ages[s] += 1
                    step = (bit * 65535 - plain[o]) * 2 // (2 * plain_ages[o] + settings[16])
                    plain[o] = min(max(plain[o] + step, 16), 65520)
                    if plain_ages[o] < settings[17]:
                        plain_ages[o] += 1
                # 5. the next decision
                if stage == 15:
                    raw -= 1
                    extra = extra << 1 | bit
                    if raw == 0:
                        if i >= 0 and decoding:
                            size = extra + 9
                        break
                elif stage == 0:
                    if not bit:
                        break
                    stage = 1
                    size = max(size, 1)
                elif stage == 1:
                    negative = bit
                    stage = 2
                elif stage < 14:
                    if not bit:
                        break
                    if decoding:
                        size = stage
                    stage += 1
                elif bit:
                    extra += 1
                    if extra > 30:
                        return -2
                else:  # size - 9 has extra + 3 bits, of which the first is known
                    raw = extra + 2
                    direct = size - 9
                    extra = 1
                    stage = 15
            if i < 0:
                continue
            if size > 0:
                if decoding:
                    value = -size if negative else size
                    if value > 2147483647 or value < -2147483648:
                        return -2
                    symbols[at] = value
                sign = -1 if negative else 1
                total += 1
                row_hits += 1
                row_sum += size
                row_signs += sign
                col_hits[j] += 1
                col_sum[j] += size
                col_signs[j] += sign
                block_hits += 1
                block_seen[part] += 1
                recent = 3
            elif j % 4 == 3 and recent > 0:
                recent -= 1
    if decoding:
        return end
    # the fewest bytes whose value, filled up with zeros, lies in [low, low + span)
    for k in range(5):
        mask = (1 << (32 - 8 * k)) - 1
        best = (low + mask) & ~mask
        if best < low + span:
            break
    if best >> 32:
        best &= 4294967295
        k0 = end - 1
        while data[k0] == 255:
            data[k0] = 0
            k0 -= 1
        data[k0] += 1
    for _ in range(k):
        data[end] = best >> 24
        best = (best << 8) & 4294967295
        end += 1
    while end > 0 and data[end - 1] == 0:
        end -= 1
    return end
