// Pays reservations at payrelay. Needs Java 17 or later, and nothing else: a Spring service can have
// it as it is, with its own JSON library in the place of `paymentIds`.
//
// A client that got no response does not know whether it has paid. So it chooses an Idempotency-Key
// before the first attempt, stores it with the order, and repeats the same request under the same
// key until payrelay answers. payrelay executes it once.

package payrelay.example

import java.io.IOException
import java.net.URI
import java.net.http.HttpClient
import java.net.http.HttpRequest
import java.net.http.HttpResponse.BodyHandlers
import java.time.Duration
import java.time.Instant
import java.util.UUID
import kotlin.random.Random
import kotlin.system.exitProcess

/** The price is in the currency's smallest unit. */
data class Reservation(val id: Long, val price: Long)

/** payrelay refuses the request, and repeating it does not help. */
class PaymentRefused(message: String) : Exception(message)

/** No response within the time: repeat later with the same key. */
class PaymentUnknown(message: String) : Exception(message)

class PaymentClient(
    private val url: String,
    private val token: String? = null,
    private val patience: Duration = Duration.ofSeconds(60),
) {
    private val http = HttpClient.newBuilder()
        .version(HttpClient.Version.HTTP_1_1)
        .connectTimeout(Duration.ofSeconds(5))
        .build()

    /**
     * Returns the payments as JSON. Call it again with the same key and the same reservations after
     * [PaymentUnknown], also after a restart of the service.
     */
    fun pay(userId: Long, reservations: List<Reservation>, key: String): String {
        val request = request(userId, reservations, key)
        val deadline = Instant.now() + patience
        var attempt = 0
        while (true) {
            var pause = Duration.ZERO
            val reason = try {
                val response = http.send(request, BodyHandlers.ofString())
                when (response.statusCode()) {
                    201 -> return response.body()
                    in TEMPORARY -> {
                        // A proxy may send a date, which counts as none.
                        val after = response.headers().firstValue("Retry-After").orElse("")
                        pause = Duration.ofSeconds(after.toLongOrNull() ?: 0)
                        "${response.statusCode()}: ${response.body()}"
                    }
                    else -> throw PaymentRefused("${response.statusCode()}: ${response.body()}")
                }
            } catch (error: IOException) {
                // No connection, or no whole response. The payment may be stored.
                error.toString()
            }
            attempt += 1
            pause = maxOf(pause, backoff(attempt))
            if (Instant.now() + pause > deadline) {
                throw PaymentUnknown("after $attempt attempts: $reason")
            }
            Thread.sleep(pause.toMillis())
        }
    }

    /** The same bytes each time: payrelay compares them. */
    private fun request(userId: Long, reservations: List<Reservation>, key: String): HttpRequest {
        val items = reservations.joinToString(",") {
            """{"reservation_id":${it.id},"seat_price":${it.price}}"""
        }
        val body = """{"user_id":$userId,"reservations":[$items]}"""
        val request = HttpRequest.newBuilder(URI.create("$url/payments"))
            .timeout(Duration.ofSeconds(10))
            .header("Content-Type", "application/json")
            .header("Idempotency-Key", "\"$key\"")
            .POST(HttpRequest.BodyPublishers.ofString(body))
        token?.let { request.header("Authorization", "Bearer $it") }
        return request.build()
    }

    private fun backoff(attempt: Int): Duration {
        val most = minOf(100L shl minOf(attempt, 10), 5_000L)
        return Duration.ofMillis(Random.nextLong(most / 2, most + 1))
    }

    private companion object {
        /** A later attempt may succeed: too slow, too many, unavailable, disk full, or a proxy. */
        val TEMPORARY = setOf(408, 429, 500, 502, 503, 504, 507)
    }
}

/** The ids of the payments in a response. */
fun paymentIds(json: String): List<Long> =
    Regex("\"id\":(\\d+)").findAll(json).map { it.groupValues[1].toLong() }.toList()

fun main(arguments: Array<String>) {
    if (arguments.size < 3) {
        System.err.println("arguments: URL USER RESERVATION:PRICE...")
        exitProcess(64)
    }
    val reservations = arguments.drop(2).map {
        val (id, price) = it.split(":")
        Reservation(id.toLong(), price.toLong())
    }
    // A shop stores the key with its order before it pays.
    val key = System.getenv("ORDER_KEY") ?: UUID.randomUUID().toString()
    val client = PaymentClient(arguments[0], System.getenv("PAYRELAY_TOKEN"))
    try {
        val paid = client.pay(arguments[1].toLong(), reservations, key)
        println(paymentIds(paid).joinToString(" "))
    } catch (error: PaymentRefused) {
        System.err.println("refused: ${error.message}")
        exitProcess(1)
    } catch (error: PaymentUnknown) {
        System.err.println("unknown, repeat it with ORDER_KEY=$key: ${error.message}")
        exitProcess(75)
    }
}
