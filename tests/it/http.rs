//! The HTTP edge of the real binary: what it answers, what it refuses, and what it survives.

use std::io::Read as _;
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};

use testkit::http::{Client, Response};
use testkit::process::{Options, Payrelay};
use testkit::wait_until;

const LIMIT: Duration = Duration::from_secs(20);

struct Fixture {
    payrelay: Payrelay,
    _dir: tempfile::TempDir,
}

fn start(env: &[(&str, &str)]) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = Payrelay::start(Options::new(dir.path(), env));
    Fixture {
        payrelay,
        _dir: dir,
    }
}

impl Fixture {
    fn client(&self) -> Client {
        Client::connect(self.payrelay.addr())
    }

    fn post(&self, body: &str) -> Response {
        let mut client = self.client();
        send(
            &mut client,
            "POST /payments",
            "Content-Type: application/json\r\n",
            body,
        );
        client.read_response()
    }
}

fn send(client: &mut Client, start: &str, headers: &str, body: &str) {
    let length = body.len();
    let request = format!(
        "{start} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    );
    client.send_raw(request.as_bytes()).unwrap();
}

fn payment(user_id: i64, reservations: impl IntoIterator<Item = i64>) -> Value {
    let reservations: Vec<_> = reservations
        .into_iter()
        .map(|id| json!({ "reservation_id": id, "seat_price": 5 }))
        .collect();
    json!({ "user_id": user_id, "reservations": reservations })
}

#[track_caller]
fn assert_problem(response: &Response, status: u16, field: Option<&str>) {
    assert_eq!(
        response.status,
        status,
        "{}",
        String::from_utf8_lossy(&response.body)
    );
    assert_eq!(
        response.header("content-type"),
        Some("application/problem+json")
    );
    let problem = response.json();
    assert_eq!(problem["status"], status);
    assert!(
        problem["type"]
            .as_str()
            .unwrap()
            .starts_with("urn:payrelay:problem:"),
        "{problem}"
    );
    assert!(
        !problem["title"].as_str().unwrap().is_empty()
            && !problem["detail"].as_str().unwrap().is_empty()
    );
    assert_eq!(
        problem.get("field").and_then(Value::as_str),
        field,
        "{problem}"
    );
}

#[test]
fn the_response_to_a_payment_follows_the_contract() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    let body =
        json!({"user_id": 42, "reservations": [{"reservation_id": 1001, "seat_price": 150_000}]});
    let created = client.post_json("/payments", &body);
    assert_eq!(
        (created.status, created.header("content-type")),
        (201, Some("application/json"))
    );
    let mut payment = created.json()["payments"][0].clone();
    let executed_at = payment["executed_at"].take();
    let executed_at = executed_at.as_str().unwrap();
    assert!(
        executed_at.len() == 27 && executed_at.ends_with('Z'),
        "{executed_at}"
    );
    payment.as_object_mut().unwrap().remove("executed_at");
    let expected = json!({
        "id": 1,
        "user_id": 42,
        "reservation_id": 1001,
        "amount": 150_000,
        "currency": "KRW",
        "status": "COMPLETED",
    });
    assert_eq!(payment, expected);

    let again = client.post_json("/payments", &body).json();
    assert_eq!(
        (&again["payments"][0]["status"], &again["payments"][0]["id"]),
        (&json!("FAILED"), &json!(2))
    );
    assert_eq!(again["payments"][0]["failure"], "already paid");
    assert_eq!(again["payments"][0]["paid_by"], 1);
    assert_eq!(client.get("/payments/2").json()["paid_by"], 1);

    wait_until("both payments to be delivered", LIMIT, || {
        [1, 2].iter().all(|id| {
            client.get(&format!("/payments/{id}")).json()["notification"]["status"] == "DELIVERED"
        })
    });
    let way = client.get("/payments/1").json();
    assert_eq!(way["event"]["status"], "PUBLISHED");
    assert!(
        way["event"]["id"].as_str().unwrap().ends_with("-1"),
        "{way}"
    );
    assert_eq!(way["event"]["created_at"], executed_at);
    for time in [
        &way["event"]["published_at"],
        &way["notification"]["delivered_at"],
    ] {
        assert!(time.as_str().unwrap() >= executed_at, "{way}");
    }
    assert_eq!(
        (&way["event"]["partition"], &way["notification"]["attempts"]),
        (&Value::Null, &json!(1))
    );
}

#[test]
fn a_history_is_paged_newest_first() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    client.post_json("/payments", &payment(7, 1..=5));
    client.post_json("/payments", &payment(8, 6..=7));
    let mut path = "/users/7/payment-history?limit=2".to_owned();
    let mut pages = Vec::new();
    loop {
        let page = client.get(&path).json();
        let ids: Vec<_> = page["payments"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["id"].as_i64().unwrap())
            .collect();
        pages.push(ids);
        match page["next"].as_str() {
            Some(next) => path = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(pages, [vec![5, 4], vec![3, 2], vec![1]]);
    assert_eq!(
        client.get("/users/9/payment-history").json()["payments"],
        json!([])
    );
    assert_eq!(
        client.get("/users/7/payment-history?before=1").json()["payments"],
        json!([])
    );
    for not_theirs in ["6", "99"] {
        let path = format!("/users/7/payment-history?before={not_theirs}");
        assert_problem(&client.get(&path), 422, Some("before"));
    }
    assert_problem(
        &client.get("/users/7/payment-history?limit=0"),
        422,
        Some("limit"),
    );
    assert_problem(
        &client.get("/users/7/payment-history?page=2"),
        422,
        Some("page"),
    );
}

#[test]
fn health_is_reported() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    assert_eq!(client.get("/health/live").json(), json!({"status": "live"}));
    let ready = client.get("/health/ready");
    assert_eq!(ready.status, 200);
    let ready = ready.json();
    assert_eq!(ready["status"], "ready");
    for component in ["database", "disk", "publisher", "slack"] {
        assert_eq!(ready["components"][component]["state"], "up");
    }
    client
        .send_raw(b"HEAD /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    assert_eq!(client.read_interim().status, 200);
    assert_eq!(
        client.get("/health/live").status,
        200,
        "the answer to HEAD had no body"
    );
}

#[test]
fn a_body_that_is_no_json_is_refused() {
    let fixture = start(&[]);
    for body in ["", "nonsense", "{\"user_id\": 1", "\u{feff}{}"] {
        assert_problem(&fixture.post(body), 400, None);
    }
}

#[test]
fn problems_name_wrong_types_and_unknown_fields() {
    let fixture = start(&[]);
    assert_problem(&fixture.post("[]"), 422, Some("body"));
    assert_problem(&fixture.post("{}"), 422, Some("user_id"));
    assert_problem(
        &fixture.post(r#"{"user_id":"1","reservations":[]}"#),
        422,
        Some("user_id"),
    );
    assert_problem(
        &fixture.post(r#"{"user_id":1,"reservations":[],"note":""}"#),
        422,
        Some("note"),
    );
    let body = r#"{"user_id":1,"reservations":[{"reservation_id":1,"seat_price":true}]}"#;
    assert_problem(&fixture.post(body), 422, Some("reservations[0].seat_price"));
}

#[test]
fn the_number_of_reservations_is_bounded() {
    let fixture = start(&[]);
    assert_problem(
        &fixture.post(&payment(1, []).to_string()),
        422,
        Some("reservations"),
    );
    assert_problem(
        &fixture.post(&payment(1, 1..=1001).to_string()),
        422,
        Some("reservations"),
    );
    let thousand = fixture.post(&payment(1, 1..=1000).to_string());
    assert_eq!(
        (
            thousand.status,
            thousand.json()["payments"].as_array().unwrap().len()
        ),
        (201, 1000)
    );
}

#[test]
fn a_reservation_named_twice_is_refused() {
    let fixture = start(&[]);
    assert_problem(
        &fixture.post(&payment(1, [5, 6, 5]).to_string()),
        422,
        Some("reservations[2].reservation_id"),
    );
    assert_eq!(
        fixture.post(&payment(1, [5]).to_string()).json()["payments"][0]["status"],
        "COMPLETED"
    );
}

#[test]
fn impossible_numbers_are_refused() {
    let fixture = start(&[]);
    let post = |user: &str, id: &str, price: &str| {
        fixture.post(&format!(
            r#"{{"user_id":{user},
                    "reservations":[{{"reservation_id":{id},"seat_price":{price}}}]}}"#
        ))
    };
    let id = Some("reservations[0].reservation_id");
    let price = Some("reservations[0].seat_price");
    for bad in [
        "-1",
        "9223372036854775808",
        "18446744073709551616",
        "1.5",
        "1e3",
    ] {
        assert_problem(&post(bad, "1", "1"), 422, Some("user_id"));
        assert_problem(&post("1", bad, "1"), 422, id);
        assert_problem(&post("1", "1", bad), 422, price);
    }
    let largest = i64::MAX.to_string();
    assert_eq!(
        post(&largest, &largest, &largest).json()["payments"][0]["amount"],
        i64::MAX
    );
    let mut client = fixture.client();
    assert_problem(&client.get("/payments/9223372036854775808"), 404, None);
    assert_problem(
        &client.get("/users/9223372036854775808/payment-history"),
        404,
        None,
    );
    assert_problem(&client.get("/payments/x"), 404, None);
    assert_problem(
        &client.get("/payments?reservation_id=9223372036854775808"),
        422,
        Some("reservation_id"),
    );
    assert_problem(&client.get("/payments/9223372036854775807"), 404, None);
}

#[test]
fn a_body_over_the_limit_is_refused_with_and_without_its_length() {
    let fixture = start(&[("PAYRELAY_HTTP_BODY_BYTES_MAX", "65536")]);
    // More than fits into the buffers of both sockets, less than what is discarded.
    let body = "x".repeat(1_000_000);
    assert_problem(&fixture.post(&body), 413, None);
    let mut client = fixture.client();
    let head = "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: \
        application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    client.send_raw(head.as_bytes()).unwrap();
    for part in body.as_bytes().chunks(1000) {
        client
            .send_raw(
                format!("{:x}\r\n{}\r\n", part.len(), String::from_utf8_lossy(part)).as_bytes(),
            )
            .unwrap();
    }
    client.send_raw(b"0\r\n\r\n").unwrap();
    assert_problem(&client.read_response(), 413, None);
    // Within the limit, chunked is as good as any other.
    let mut client = fixture.client();
    let small = payment(1, [1]).to_string();
    client
        .send_raw(format!("{head}{:x}\r\n{small}\r\n0\r\n\r\n", small.len()).as_bytes())
        .unwrap();
    assert_eq!(client.read_response().status, 201);
}

#[test]
fn wrong_methods_types_and_paths_are_refused() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    send(&mut client, "PUT /payments", "", "");
    let refused = client.read_response();
    assert_problem(&refused, 405, None);
    assert_eq!(refused.header("allow"), Some("GET, HEAD, POST"));
    send(&mut client, "DELETE /payments/1", "", "");
    let refused = client.read_response();
    assert_problem(&refused, 405, None);
    assert_eq!(refused.header("allow"), Some("GET, HEAD"));
    for headers in [
        "Content-Type: text/plain\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\n",
        "",
    ] {
        let mut client = fixture.client();
        send(&mut client, "POST /payments", headers, "{}");
        assert_problem(&client.read_response(), 415, None);
    }
    for path in [
        "/payment",
        "/payments/1/2",
        "/users/1",
        "/%2e%2e/etc/passwd",
    ] {
        assert_problem(&client.get(path), 404, None);
    }
}

#[test]
fn a_client_that_expects_100_continue_gets_it_or_the_refusal() {
    let fixture = start(&[("PAYRELAY_HTTP_BODY_BYTES_MAX", "2048")]);
    let head = |length| {
        format!(
            "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: \
                application/json\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    let body = payment(1, [1]).to_string();
    let mut client = fixture.client();
    client.send_raw(head(body.len()).as_bytes()).unwrap();
    assert_eq!(client.read_interim().status, 100);
    client.send_raw(body.as_bytes()).unwrap();
    assert_eq!(client.read_response().status, 201);
    let mut client = fixture.client();
    client.send_raw(head(1_000_000).as_bytes()).unwrap();
    let refused = client.read_response();
    assert_problem(&refused, 413, None);
}

#[test]
fn a_client_that_disconnects_mid_body_stores_nothing_and_hurts_no_other() {
    let fixture = start(&[]);
    let body = payment(1, [1]).to_string();
    for cut in [0, 1, body.len() / 2, body.len() - 1] {
        let mut client = fixture.client();
        let head = format!(
            "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: \
                application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        client
            .send_raw(format!("{head}{}", &body[..cut]).as_bytes())
            .unwrap();
        drop(client);
    }
    let stored = fixture.post(&payment(1, [1]).to_string()).json();
    assert_eq!(
        (
            &stored["payments"][0]["id"],
            &stored["payments"][0]["status"]
        ),
        (&json!(1), &json!("COMPLETED"))
    );
}

#[test]
fn a_body_that_does_not_arrive_times_out() {
    let fixture = start(&[("PAYRELAY_HTTP_BODY_TIMEOUT", "200ms")]);
    let mut client = fixture.client();
    let head = "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: \
        application/json\r\nContent-Length: 10\r\n\r\n{";
    client.send_raw(head.as_bytes()).unwrap();
    assert_problem(&client.read_response(), 408, None);
}

#[test]
fn a_thousand_incomplete_heads_delay_no_other_client() {
    let fixture = start(&[("PAYRELAY_HTTP_HEADER_TIMEOUT", "8s")]);
    let begin = |_| {
        let mut client = fixture.client();
        client
            .send_raw(b"POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Ty")
            .unwrap();
        client
    };
    let mut half: Vec<_> = (0..1000).map(begin).collect();
    let mut client = fixture.client();
    for id in 1..=20 {
        assert_eq!(client.post_json("/payments", &payment(1, [id])).status, 201);
    }
    assert!(
        half.iter_mut().all(Client::closed_by_server),
        "half heads are given up"
    );
}

#[test]
fn a_thousand_connections_in_a_burst_are_all_answered_and_kept() {
    let fixture = start(&[]);
    let mut clients: Vec<_> = (0..1000).map(|_| fixture.client()).collect();
    for round in 0..2_i64 {
        for (index, client) in (0_i64..).zip(&mut clients) {
            let body = payment(index, [round * 1000 + index]).to_string();
            send(
                client,
                "POST /payments",
                "Content-Type: application/json\r\n",
                &body,
            );
        }
        for client in &mut clients {
            assert_eq!(client.read_response().status, 201);
        }
    }
}

/// Sends the bytes, shuts the sending side down, and reads to the end.
fn half_closed(fixture: &Fixture, request: &str) -> String {
    let mut stream = TcpStream::connect(fixture.payrelay.addr()).unwrap();
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_client_that_shuts_its_sending_side_down_is_answered() {
    let fixture = start(&[]);
    for id in 1..=50 {
        let body = payment(1, [id]).to_string();
        let head =
            "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
        let answer = half_closed(
            &fixture,
            &format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()),
        );
        assert!(answer.starts_with("HTTP/1.1 201"), "{id}: {answer}");
    }
    let get = |path: &str| {
        half_closed(
            &fixture,
            &format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        )
    };
    assert!(get("/payments/50").starts_with("HTTP/1.1 200"));
    assert!(get("/nowhere").starts_with("HTTP/1.1 404"));
    let two = "GET /payments/1 HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(2);
    assert_eq!(
        half_closed(&fixture, &two).matches("HTTP/1.1 200").count(),
        2
    );
}

#[test]
fn a_connection_with_an_unwritten_response_stays_open() {
    const ANSWERS: usize = 12;
    let env = [
        ("PAYRELAY_HTTP_CONNECTIONS_MAX", "2"),
        ("PAYRELAY_HTTP_CLIENT_CONNECTIONS_MAX", "2"),
    ];
    let fixture = start(&env);
    let mut slow = fixture.client();
    assert_eq!(
        slow.post_json("/payments", &payment(1, 1..=500)).status,
        201
    );
    // Far more than the buffers of both sides hold, and nothing is read.
    let page = "GET /users/1/payment-history?limit=500 HTTP/1.1\r\nHost: localhost\r\n\r\n";
    slow.send_raw(page.repeat(ANSWERS).as_bytes()).unwrap();
    // Each takes the place of the one before it, which has been idle for a shorter time than the
    // first.
    for _ in 0..4 {
        assert_eq!(fixture.client().get("/health/live").status, 200);
        let mut kept = fixture.client();
        assert_eq!(kept.get("/health/live").status, 200);
        assert_eq!(fixture.client().get("/health/live").status, 200);
    }
    for _ in 0..ANSWERS {
        let answer = slow.read_response();
        assert_eq!(
            (
                answer.status,
                answer.json()["payments"].as_array().unwrap().len()
            ),
            (200, 500)
        );
    }
}

#[test]
fn a_proxied_request_needs_a_token() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    let headers = [
        "Forwarded: for=10.0.0.1",
        "X-Forwarded-For: 10.0.0.1",
        "x-forwarded-proto: http",
        "Via: 1.1 p",
        "X-Real-IP: ::1",
    ];
    for header in headers {
        for path in [
            "GET /payments/1",
            "GET /admin/channels",
            "GET /health/ready",
        ] {
            send(&mut client, path, &format!("{header}\r\n"), "");
            let refused = client.read_response();
            assert_problem(&refused, 403, None);
            assert!(
                refused.json()["detail"]
                    .as_str()
                    .unwrap()
                    .contains("configure tokens"),
                "{header}"
            );
        }
        send(
            &mut client,
            "GET /health/live",
            &format!("{header}\r\n"),
            "",
        );
        assert_eq!(client.read_response().status, 200, "{header}");
    }
    fixture.payrelay.wait_for_log(
        "refused requests that are not allowed: 403 (1), the last from 127.0.0.1",
        LIMIT,
    );
}

#[test]
fn a_request_needs_exactly_one_valid_host() {
    let fixture = start(&[]);
    for hosts in [
        "",
        "Host: a\r\nHost: a\r\n",
        "Host: a b\r\n",
        "Host: user@localhost\r\n",
        "Host: localhost:x\r\n",
    ] {
        let mut client = fixture.client();
        client
            .send_raw(format!("GET /health/live HTTP/1.1\r\n{hosts}\r\n").as_bytes())
            .unwrap();
        assert_problem(&client.read_response(), 400, None);
    }
    let mut client = fixture.client();
    client
        .send_raw(b"GET /health/live HTTP/1.0\r\n\r\n")
        .unwrap();
    assert_eq!(client.read_response().status, 200, "HTTP/1.0 has no Host");
}

#[test]
fn unknown_codings_are_refused() {
    let fixture = start(&[]);
    let body = payment(1, [1]).to_string();
    for coding in ["gzip", "identity, br", "x"] {
        let mut client = fixture.client();
        let headers = format!("Content-Type: application/json\r\nContent-Encoding: {coding}\r\n");
        send(&mut client, "POST /payments", &headers, &body);
        let refused = client.read_response();
        assert_problem(&refused, 415, None);
        assert_eq!(refused.header("accept-encoding"), Some("identity"));
    }
    let mut client = fixture.client();
    send(
        &mut client,
        "POST /payments",
        "Content-Type: application/json\r\nContent-Encoding: Identity\r\n",
        &body,
    );
    assert_eq!(client.read_response().status, 201, "it changes nothing");
    let mut client = fixture.client();
    let head = "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    client
        .send_raw(format!("{head}Transfer-Encoding: gzip, chunked\r\n\r\n").as_bytes())
        .unwrap();
    let refused = client.read_response();
    assert_problem(&refused, 501, None);
    assert_eq!(refused.header("connection"), Some("close"));
}

#[test]
fn unexpected_parameters_and_bodies_are_refused() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    let typed = "Content-Type: application/json\r\n";
    send(
        &mut client,
        "POST /payments?dry_run=true",
        typed,
        &payment(1, [1]).to_string(),
    );
    assert_problem(&client.read_response(), 422, Some("dry_run"));
    assert_problem(&client.get("/health/ready?verbose=1"), 422, Some("verbose"));
    assert_problem(&client.get("/payments/1?full=1"), 422, Some("full"));
    for line in [
        "GET /payments/1",
        "GET /health/ready",
        "GET /health/live",
        "POST /admin/channels/default/resume",
    ] {
        send(&mut client, line, typed, "{}");
        assert_problem(&client.read_response(), 422, Some("body"));
    }
    for (line, chunks, status) in [
        ("GET /health/ready", "0\r\n\r\n", 200),
        ("GET /health/live", "0\r\n\r\n", 200),
        ("GET /health/live", "2\r\n{}\r\n0\r\n\r\n", 422),
    ] {
        let mut client = fixture.client();
        let head =
            format!("{line} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
        client
            .send_raw(format!("{head}{chunks}").as_bytes())
            .unwrap();
        assert_eq!(client.read_response().status, status, "{line} {chunks:?}");
    }
    assert_problem(
        &client.post_json("/admin/dead-letters/replay", &Value::Null),
        422,
        Some("all"),
    );
    assert_eq!(
        client
            .post_json("/admin/dead-letters/replay?all=true", &Value::Null)
            .status,
        200
    );
    assert_eq!(
        client.get("/payments?reservation_id=1").json(),
        json!({"payments": []}),
        "nothing was paid"
    );
}

#[test]
fn a_reservation_shows_the_payment_that_paid_it() {
    let fixture = start(&[]);
    let mut client = fixture.client();
    let created = client.post_json("/payments", &payment(1, [7]));
    assert_eq!(created.header("location"), Some("/payments/1"));
    let failed = client.post_json("/payments", &payment(2, [7, 8]));
    assert_eq!(
        failed.header("location"),
        None,
        "two payments have no address of their own"
    );
    assert_eq!(failed.json()["payments"][0]["paid_by"], 1);
    assert!(failed.json()["payments"][1].get("paid_by").is_none());
    let paid = client.get("/payments?reservation_id=7").json();
    assert_eq!(
        (
            &paid["payments"][0]["id"],
            paid["payments"].as_array().unwrap().len()
        ),
        (&json!(1), 1)
    );
    assert_eq!(
        client.get("/payments?reservation_id=9").json(),
        json!({"payments": []})
    );
    let about = client.get("/").json();
    assert!(
        about["name"] == "payrelay" && about["documentation"].is_string(),
        "{about}"
    );
}

#[test]
fn connections_beyond_the_limit_are_served_later() {
    let fixture = start(&[
        ("PAYRELAY_HTTP_CONNECTIONS_MAX", "2"),
        ("PAYRELAY_HTTP_CLIENT_CONNECTIONS_MAX", "2"),
    ]);
    let mut first = fixture.client();
    let mut second = fixture.client();
    assert_eq!(first.get("/health/live").status, 200);
    assert_eq!(second.get("/health/live").status, 200);
    let mut third = TcpStream::connect(fixture.payrelay.addr()).unwrap();
    std::io::Write::write_all(
        &mut third,
        b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )
    .unwrap();
    drop(first);
    third.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = String::new();
    third.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn a_full_queue_is_refused_at_once_with_retry_after() {
    let fixture = start(&[
        ("PAYRELAY_DATABASE_QUEUE_MAX", "1"),
        ("PAYRELAY_HTTP_BODY_BYTES_MAX", "200000"),
    ]);
    let mut clients: Vec<_> = (0..40).map(|_| fixture.client()).collect();
    for (index, client) in (0_i64..).zip(&mut clients) {
        let body = payment(index, index * 1000..(index + 1) * 1000).to_string();
        send(
            client,
            "POST /payments",
            "Content-Type: application/json\r\n",
            &body,
        );
    }
    let answers: Vec<_> = clients.iter_mut().map(Client::read_response).collect();
    let refused: Vec<_> = answers
        .iter()
        .filter(|answer| answer.status != 201)
        .collect();
    assert!(
        !refused.is_empty() && refused.len() < 40,
        "{} of 40 were refused",
        refused.len()
    );
    for answer in refused {
        assert_problem(answer, 503, None);
        assert_eq!(answer.header("retry-after"), Some("1"));
    }
}

#[test]
fn many_readers_do_not_make_payrelay_unready() {
    let fixture = start(&[
        ("PAYRELAY_DATABASE_QUEUE_MAX", "1"),
        ("PAYRELAY_DATABASE_READERS", "1"),
    ]);
    assert_eq!(fixture.post(&payment(1, 1..=500).to_string()).status, 201);
    let mut clients: Vec<_> = (0..40).map(|_| fixture.client()).collect();
    let mut refused = 0;
    wait_until("a full queue that a read has met", LIMIT, || {
        for (index, client) in clients.iter_mut().enumerate() {
            let path = if index % 2 == 0 {
                "/users/1/payment-history?limit=500"
            } else {
                "/health/ready"
            };
            send(client, &format!("GET {path}"), "", "");
        }
        for (index, client) in clients.iter_mut().enumerate() {
            let answer = client.read_response();
            if index % 2 == 0 {
                refused += usize::from(answer.status == 503);
            } else {
                let ready = answer.json();
                assert_eq!(
                    (answer.status, &ready["status"]),
                    (200, &json!("ready")),
                    "{ready}"
                );
            }
        }
        refused > 0
    });
}

#[test]
fn health_shows_pending_events_with_their_age() {
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1"),
    ];
    let fixture = start(&env);
    assert_eq!(fixture.post(&payment(1, 1..=3).to_string()).status, 201);
    let mut client = fixture.client();
    let mut pending = || client.get("/health/ready").json()["pending"].clone();
    wait_until("the sampler to count three events", LIMIT, || {
        pending()["unpublished"]["count"] == 3
    });
    let first = pending();
    assert!(
        first["unpublished"]["oldest_at"].is_string() && first["sampled_at"].is_string(),
        "{first}"
    );
    wait_until("the age to grow", LIMIT, || {
        pending()["unpublished"]["oldest_age_s"].as_u64() > Some(0)
    });
    let none = json!({ "count": 0, "oldest_at": null, "oldest_age_s": 0 });
    for what in ["unconsumed", "undelivered", "dead_letters"] {
        assert_eq!(first[what], none, "{what}");
    }
}

#[test]
fn a_refusal_after_100_continue_is_read_by_a_client_that_keeps_writing() {
    let fixture = start(&[]);
    let head = "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: \
        application/json\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n";
    let body = [
        b"180000\r\n".as_slice(),
        &b" ".repeat(0x18_0000),
        b"\r\n0\r\n\r\n",
    ]
    .concat();
    for _ in 0..10 {
        let mut client = fixture.client();
        client.send_raw(head.as_bytes()).unwrap();
        assert_eq!(client.read_interim().status, 100);
        client.send_raw(&body).unwrap();
        assert_problem(&client.read_response(), 413, None);
    }
}

#[test]
fn a_refusal_repeats_little_of_the_request() {
    let fixture = start(&[]);
    let long = "x".repeat(5000);
    let paths = [
        format!("/{long}"),
        format!("/admin/{long}"),
        format!("/admin/channels/{long}/resume"),
        format!("/users/1/payment-history?{long}=1"),
        format!("/admin/dead-letters?{long}=1&{long}=2"),
    ];
    for path in paths {
        let mut client = fixture.client();
        send(
            &mut client,
            &format!(
                "{} {path}",
                if path.ends_with("resume") {
                    "POST"
                } else {
                    "GET"
                }
            ),
            "",
            "",
        );
        let refused = client.read_response();
        assert!(
            [404, 422].contains(&refused.status),
            "{}: {path:.30}",
            refused.status
        );
        assert!(
            refused.body.len() < 1000,
            "{} bytes: {path:.30}",
            refused.body.len()
        );
        let problem = refused.json();
        assert!(
            [&problem["detail"], &problem["field"]]
                .iter()
                .any(|text| text.to_string().contains("xxx...")),
            "{problem}"
        );
    }
}
