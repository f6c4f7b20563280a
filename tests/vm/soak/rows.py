"""Rows in a database of sqlite that is on a device.

  rows.py write DATABASE JOURNAL ACKNOWLEDGED   until ./ended is there
  rows.py check DATABASE LAST                   every row up to LAST is there, and whole
"""
import hashlib
import os
import random
import sqlite3
import sys

# Each transaction has some, so that there is something to tear.
ROWS_MAX = 8
# How many transactions a connection is used for, so that logs are replayed, too.
TRANSACTIONS_MAX = 200


def content(number):
    return hashlib.sha256(str(number).encode()).hexdigest() * (1 + number % 40)


def connect(database, journal=None):
    connection = sqlite3.connect(database, timeout=600, isolation_level=None)
    if journal:
        connection.execute(f'PRAGMA journal_mode={journal}')
    # Less does not wait for the end of the journal file, which is the commit, on stable storage.
    connection.execute('PRAGMA synchronous=EXTRA')
    return connection


def write(database, journal, acknowledged):
    number = 0
    with open(acknowledged, 'w') as told:
        while not os.path.exists('ended'):
            connection = connect(database, journal)
            connection.execute('CREATE TABLE IF NOT EXISTS rows (number INTEGER, content TEXT)')
            for _ in range(random.randint(1, TRANSACTIONS_MAX)):
                if os.path.exists('ended'):
                    break
                connection.execute('BEGIN')
                for _ in range(random.randint(1, ROWS_MAX)):
                    number += 1
                    row = (number, content(number))
                    connection.execute('INSERT INTO rows VALUES (?, ?)', row)
                connection.execute('COMMIT')
                told.write(f'{number}\n')
                told.flush()
            connection.close()


def check(database, last):
    connection = connect(database)
    said = connection.execute('PRAGMA integrity_check').fetchall()
    if said != [('ok',)]:
        sys.exit(f'{database}: {said}')
    expected = 0
    for number, found in connection.execute('SELECT number, content FROM rows ORDER BY rowid'):
        expected += 1
        if number != expected or found != content(number):
            sys.exit(f'{database}: row {expected} is not what was written')
    if expected < int(last):
        sys.exit(f'{database}: {expected} rows, and {last} were committed')
    print(expected)


{'write': write, 'check': check}[sys.argv[1]](*sys.argv[2:])
