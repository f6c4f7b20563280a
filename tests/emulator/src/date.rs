//! Times in the three forms that S3 uses, in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

const DAY_S: i64 = 86_400;

/// A time of the store's clock, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Date(i64);

impl Date {
    pub(crate) fn now(ahead_s: i64) -> Self {
        Self(Self::of(SystemTime::now()).0 + ahead_s)
    }

    pub(crate) fn of(time: SystemTime) -> Self {
        Self(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64)
    }

    /// Parses `20130524T000000Z`.
    pub(crate) fn parse_basic(text: &str) -> Option<Self> {
        let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
        let number = |text: &str, at: usize, len: usize| -> Option<i64> {
            let digits = text.get(at..at + len)?;
            digits.bytes().all(|digit| digit.is_ascii_digit()).then(|| digits.parse().ok())?
        };
        if date.len() != 8 || time.len() != 6 {
            return None;
        }
        let days = days_from_civil(number(date, 0, 4)?, number(date, 4, 2)?, number(date, 6, 2)?);
        let seconds = number(time, 0, 2)? * 3600 + number(time, 2, 2)? * 60 + number(time, 4, 2)?;
        Some(Self(days * DAY_S + seconds))
    }

    /// `20130524T000000Z`.
    pub(crate) fn basic(self) -> String {
        let (year, month, day) = self.civil();
        let (hour, minute, second) = self.clock();
        format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
    }

    /// `2013-05-24T00:00:00.000Z`, as in lists.
    pub(crate) fn iso(self) -> String {
        let (year, month, day) = self.civil();
        let (hour, minute, second) = self.clock();
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.000Z")
    }

    /// `Fri, 24 May 2013 00:00:00 GMT`, as in headers.
    pub(crate) fn http(self) -> String {
        const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
        const MONTHS: [&str; 12] =
            ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        let weekday = DAYS[self.0.div_euclid(DAY_S).rem_euclid(7) as usize];
        let (year, month, day) = self.civil();
        let month = MONTHS[month as usize - 1];
        let (hour, minute, second) = self.clock();
        format!("{weekday}, {day:02} {month} {year:04} {hour:02}:{minute:02}:{second:02} GMT")
    }

    pub(crate) fn seconds_to(self, other: Self) -> u64 {
        self.0.abs_diff(other.0)
    }

    fn clock(self) -> (i64, i64, i64) {
        let seconds = self.0.rem_euclid(DAY_S);
        (seconds / 3600, seconds / 60 % 60, seconds % 60)
    }

    /// Year, month and day. Years begin in March here, so that the leap day is the last.
    fn civil(self) -> (i64, i64, i64) {
        let days = self.0.div_euclid(DAY_S) + 719_468;
        let era = days.div_euclid(146_097);
        let of_era = days.rem_euclid(146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * of_year + 2) / 153;
        let day = of_year - (153 * from_march + 2) / 5 + 1;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        (year_of_era + era * 400 + i64::from(month <= 2), month, day)
    }
}

/// Days since 1970 of a date.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let year_of_era = year.rem_euclid(400);
    let from_march = (month + 9) % 12;
    let of_year = (153 * from_march + 2) / 5 + day - 1;
    let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
    year.div_euclid(400) * 146_097 + of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times_have_their_forms() {
        let date = Date::parse_basic("20130524T010203Z").expect("a date");
        assert_eq!(date, Date(1_369_357_323));
        assert_eq!(date.http(), "Fri, 24 May 2013 01:02:03 GMT");
        assert_eq!(date.iso(), "2013-05-24T01:02:03.000Z");
        assert_eq!(Date(951_782_400).http(), "Tue, 29 Feb 2000 00:00:00 GMT");
        assert_eq!(Date(0).basic(), "19700101T000000Z");
    }

    #[test]
    fn what_is_written_is_read() {
        for days in 0..40_000 {
            let date = Date(days * DAY_S + days % DAY_S);
            assert_eq!(Date::parse_basic(&date.basic()), Some(date));
        }
    }

    #[test]
    fn other_texts_are_no_dates() {
        for text in ["", "20130524", "20130524T010203", "2013052T0010203Z", "2013+524T010203Z"] {
            assert_eq!(Date::parse_basic(text), None, "{text}");
        }
    }
}
