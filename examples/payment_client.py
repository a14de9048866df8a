"""Pays reservations at payrelay. Needs Python 3.9 or later, and nothing else.

    python3 payment_client.py http://127.0.0.1:8080 42 1001:150000 1002:150000

A client that got no response does not know whether it has paid. So it chooses an Idempotency-Key
before the first attempt, stores it with the order, and repeats the same request under the same key
until payrelay answers. payrelay executes it once.
"""

import http.client
import json
import os
import random
import sys
import time
import urllib.error
import urllib.request
import uuid


class PaymentRefused(Exception):
    """payrelay refuses the request, and repeating it does not help."""


class PaymentUnknown(Exception):
    """No response within the time: repeat later with the same key."""


# A later attempt may succeed: too slow, too many, unavailable, disk full, and what a proxy says.
TEMPORARY = {408, 429, 500, 502, 503, 504, 507}


def pay(url, user_id, reservations, key, token=None, patience=60.0):
    """Returns the payments. `reservations` has pairs of an id and a price in the smallest unit.

    Call it again with the same key and the same reservations after PaymentUnknown, also after a
    restart of this program.
    """
    # The same bytes each time: payrelay compares them.
    body = json.dumps(
        {
            "user_id": user_id,
            "reservations": [
                {"reservation_id": reservation, "seat_price": price}
                for reservation, price in reservations
            ],
        }
    ).encode()
    headers = {"Content-Type": "application/json", "Idempotency-Key": f'"{key}"'}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    deadline = time.monotonic() + patience
    attempt = 0
    while True:
        request = urllib.request.Request(f"{url}/payments", data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return json.load(response)["payments"]
        except urllib.error.HTTPError as error:
            if error.code not in TEMPORARY:
                raise PaymentRefused(f"{error.code}: {detail(error)}") from error
            reason = f"{error.code}: {detail(error)}"
            pause = seconds(error.headers.get("Retry-After"))
        except (OSError, ValueError, http.client.HTTPException) as error:
            # No connection, or no whole response. The payment may be stored.
            reason, pause = str(error), 0.0
        attempt += 1
        pause = max(pause, random.uniform(0.5, 1.0) * min(0.1 * 2**attempt, 5.0))
        if time.monotonic() + pause > deadline:
            raise PaymentUnknown(f"after {attempt} attempts: {reason}")
        time.sleep(pause)


def detail(error):
    """The sentence of a problem (RFC 9457)."""
    try:
        return json.load(error)["detail"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return error.reason


def seconds(retry_after):
    """payrelay sends seconds. A proxy may send a date, which counts as none."""
    return float(retry_after) if (retry_after or "").isdigit() else 0.0


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    url, user_id, *pairs = sys.argv[1:]
    reservations = [tuple(int(number) for number in pair.split(":")) for pair in pairs]
    # A shop stores the key with its order before it pays.
    key = os.environ.get("ORDER_KEY") or str(uuid.uuid4())
    token = os.environ.get("PAYRELAY_TOKEN")
    try:
        payments = pay(url.rstrip("/"), int(user_id), reservations, key, token)
    except PaymentRefused as error:
        sys.exit(f"refused: {error}")
    except PaymentUnknown as error:
        sys.exit(f"unknown, repeat it with ORDER_KEY={key}: {error}")
    for payment in payments:
        print(payment["id"], payment["reservation_id"], payment["status"])


if __name__ == "__main__":
    main()
