//! `/openapi.json`: the description of the API. It is written by hand, and the tests compare it
//! with the routes and the problems.

use hyper::Response;

use super::response::{Body, text_response};

/// `OpenAPI` 3.1 (<https://spec.openapis.org/oas/v3.1.0>).
const DOCUMENT: &str = include_str!("openapi.json");

pub(super) fn serve_openapi() -> Response<Body> {
    text_response("application/json", DOCUMENT)
}

#[cfg(test)]
mod tests {
    use super::super::problem;
    use super::super::router::ROUTES;
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeSet;

    fn document() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    #[test]
    fn the_document_has_every_route_and_no_other() {
        let document = document();
        let paths = document["paths"].as_object().unwrap();
        let described: BTreeSet<String> = paths
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().unwrap().keys();
                methods.map(move |method| format!("{} {path}", method.to_uppercase()))
            })
            .collect();
        let served: BTreeSet<String> = ROUTES
            .iter()
            .map(|route| route.split('?').next().unwrap().to_owned())
            .collect();
        assert_eq!(described, served);
    }

    #[test]
    fn the_document_has_every_problem() {
        let document = document();
        let types = &document["components"]["schemas"]["Problem"]["properties"]["type"]["enum"];
        let described: BTreeSet<&str> = types
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|problem| problem.as_str()?.strip_prefix("urn:payrelay:problem:"))
            .collect();
        let known: BTreeSet<&str> = problem::TITLES.iter().map(|(slug, _)| *slug).collect();
        assert_eq!(described, known);
    }

    #[test]
    fn the_document_has_the_version_of_the_program() {
        assert_eq!(document()["info"]["version"], env!("CARGO_PKG_VERSION"));
    }
}
