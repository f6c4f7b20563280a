#!/bin/bash
# Does not end.
. ./common.sh

sleep infinity
