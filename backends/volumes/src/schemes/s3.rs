//! `s3://bucket/prefix/name`: an object volume in a bucket; with `@snapshot` its snapshot.

use std::sync::Arc;

use sheave_core::Result;

use crate::parse::Parameters;
use crate::source::{Scheme, Source, Url};

pub(crate) const SCHEME: Scheme = Scheme { names: &["s3"], starts_program: false, parse };

#[cfg(not(feature = "s3"))]
fn parse(url: &Url<'_>, _: &mut Parameters) -> Result<Arc<dyn Source>> {
    let why = format!("{}: this program was built without buckets (feature s3)", url.text);
    Err(sheave_core::Error::new(sheave_core::ErrorKind::Unsupported, "parse volume", why))
}

#[cfg(feature = "s3")]
use in_bucket::parse;

#[cfg(feature = "s3")]
mod in_bucket {
    use std::ffi::OsStr;

    use sheave_core::is_plain;
    use sheave_s3::{Endpoint, S3Store};

    use super::*;
    use crate::names::export_name;
    use crate::parse::percent_decode;
    use crate::schemes::objects::{Objects, export_of, split_snapshot};

    /// Keys have up to 1024 bytes; what is below a volume's has less than 100.
    const PLACE_BYTES_MAX: usize = 900;
    /// Names of what is below a volume, which another volume there would be mixed up with.
    const TAKEN: [&str; 4] = ["log", "pin", "probe", "root"];

    pub(super) fn parse(url: &Url<'_>, parameters: &mut Parameters) -> Result<Arc<dyn Source>> {
        let path = url.rest.strip_prefix("//").and_then(|path| path.split_once('/'));
        let Some((bucket, place)) = path else {
            return Err(parameters.wrong("write a bucket and a name, s3://bucket/prefix/name"));
        };
        check_bucket(bucket, parameters)?;
        let (place, snapshot) = split_snapshot(place, parameters)?;
        let place = percent_decode(place)?;
        let name = check_place(&place, parameters)?;
        let endpoint = Endpoint {
            url: parameters.take("endpoint")?.map(|url| check_url(url, parameters)).transpose()?,
            region: parameters.take("region")?.filter(|region| !region.is_empty()),
            path_style: parameters.take_switch("path-style")?,
        };
        let known_as = match &endpoint.url {
            Some(url) => format!("{}?endpoint={url}", url_of(bucket, &place, snapshot.as_deref())),
            None => url_of(bucket, &place, snapshot.as_deref()),
        };
        let store = S3Store::new(&endpoint, bucket, &place);
        let store = match parameters.take("fencing")?.as_deref() {
            None | Some("probe") => store,
            Some("none") => store.without_fencing(),
            Some(_) => return Err(parameters.wrong("fencing= is probe or none")),
        };
        let export = export_of(export_name(OsStr::new(name)), snapshot.as_deref());
        Objects::parse(known_as, export, (Arc::new(store), snapshot), parameters)
    }

    fn url_of(bucket: &str, place: &str, snapshot: Option<&str>) -> String {
        let is_kept = |c| is_plain(c) && !char::is_whitespace(c) && !"%?#@".contains(c);
        let place = sheave_core::percent_encode(place.as_bytes(), is_kept);
        export_of(format!("s3://{bucket}/{place}"), snapshot)
    }

    fn check_bucket(bucket: &str, parameters: &Parameters) -> Result<()> {
        let is_kept = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if !(3..=255).contains(&bucket.len()) || !bucket.chars().all(is_kept) {
            let why = "a bucket's name has at least 3 letters, digits, dots, dashes or underscores";
            return Err(parameters.wrong(why));
        }
        match bucket.ends_with("--x-s3") {
            true => Err(parameters.wrong(
                "directory buckets (S3 Express) list objects in no order; choose another bucket",
            )),
            false => Ok(()),
        }
    }

    /// The last part of a place, which is the volume's name.
    fn check_place<'a>(place: &'a str, parameters: &Parameters) -> Result<&'a str> {
        let is_part = |part: &str| {
            !matches!(part, "" | "." | "..") && part.chars().all(|c| is_plain(c) && c != '\\')
        };
        let name = place.rsplit('/').next().unwrap_or(place);
        if place.len() > PLACE_BYTES_MAX || !place.split('/').all(is_part) {
            let why = format!(
                "the place in the bucket is prefix/name, of printable characters, with no empty \
                 part and no . or .., at most {PLACE_BYTES_MAX} bytes"
            );
            return Err(parameters.wrong(&why));
        }
        match TAKEN.contains(&name) {
            true => {
                let why = format!("a volume cannot be named {}", TAKEN.join(", "));
                Err(parameters.wrong(&why))
            }
            false => Ok(name),
        }
    }

    fn check_url(url: String, parameters: &Parameters) -> Result<String> {
        let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
        match rest {
            Some(rest) if !rest.is_empty() && !rest.contains(['?', '#', '@']) => {
                Ok(url.trim_end_matches('/').to_owned())
            }
            _ => Err(parameters.wrong("endpoint= is a URL, http://127.0.0.1:9000 or https://…")),
        }
    }
}
